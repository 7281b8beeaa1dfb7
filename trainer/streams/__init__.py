"""Batches of data without a length: streams of samples, and users' own loaders of batches."""
