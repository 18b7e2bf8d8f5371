"""The LLaMA architecture: thin Linen modules behind pure functions."""
