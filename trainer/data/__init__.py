"""From a dataset to each rank's batches."""

from .indexed import Source
from .transfer import to_device

__all__ = ["Source", "to_device"]
