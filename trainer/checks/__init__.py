"""What users pass in, checked before it is used: the right kind, and the same on every rank."""
