"""Models of other projects' formats, in and out: Hugging Face, Meta, GGUF."""
