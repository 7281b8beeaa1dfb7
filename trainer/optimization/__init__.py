"""From a batch's gradient to the next weights."""
