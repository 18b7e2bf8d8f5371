"""Changes to a trained model: low-rank overlays, quantised bases, other vocabularies."""
