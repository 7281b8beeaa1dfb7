"""From a dataset, stream or loader to each rank's batches."""

from .batch_tensors import to_device
from .indexed import Source

__all__ = ["Source", "to_device"]
