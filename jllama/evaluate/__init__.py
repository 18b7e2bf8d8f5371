"""Evaluates trained models: perplexity, infilling, compression."""
