"""What is made from a trained model: other vocabularies."""
