"""Files at a path or URL, results that appear whole or not at all, locks, and mirrors."""
