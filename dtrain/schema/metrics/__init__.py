"""What is known about metrics before any is computed."""
