"""All that runs in a worker: the only home of the training code."""
