"""What changes a trained model: low-rank overlays, quantised bases, other vocabularies."""
