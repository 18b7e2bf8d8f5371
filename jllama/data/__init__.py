"""Text on disk to training rows: read, tokenise once, cut into rows, mix into batches."""
