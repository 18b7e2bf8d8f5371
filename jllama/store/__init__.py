"""Models and adapters on storage: what a path holds, and its parameters."""
