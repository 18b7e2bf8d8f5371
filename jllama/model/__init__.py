"""The LLaMA architecture: thin Linen modules, pure functions outside."""
