"""The user's model and its state."""
