"""A trained model in use: opening one, generating texts with a cache, and scoring given ones."""
