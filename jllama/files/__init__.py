"""Files by path or URL, outputs that are whole or not there, locks and mirrors."""
