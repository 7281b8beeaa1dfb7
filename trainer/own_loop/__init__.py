"""What lets a training loop of the user's own continue where it was stopped."""
