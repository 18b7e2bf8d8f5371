"""From logits to tokens: sampling rules and the engine that decodes with a cache."""
