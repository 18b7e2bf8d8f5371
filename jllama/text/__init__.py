"""Encodes text to token ids and decodes ids to text."""
