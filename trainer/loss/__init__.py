"""A micro-batch's predictions, and its loss as a sum over units."""
