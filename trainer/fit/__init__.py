"""One fit: its epochs, steps and validations, and how it is saved and continued."""
