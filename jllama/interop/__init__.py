"""Readers and writers of other projects' formats: Hugging Face, Meta, PEFT, GGUF."""
