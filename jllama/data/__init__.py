"""Turns text on disk into training rows: reads, tokenises once, packs, mixes into batches."""
