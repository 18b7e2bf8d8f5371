"""Training as a pure function: loss, optimizer, step, checkpoints, the loop."""
