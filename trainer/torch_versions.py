"""What older versions of torch lack, from 2.11 on; and which errors are a device's."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# Losses that are the weighted mean over class numbers, as CrossEntropyLoss, and not of every version.
LINEAR_CROSS_ENTROPY: tuple[Any, ...] = (nn.LinearCrossEntropyLoss,) if hasattr(nn, "LinearCrossEntropyLoss") else ()

# How DistributedDataParallel is told to leave buffers alone in forward passes.
_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
BUFFERS_APART: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}


def is_of_device(error: BaseException) -> bool:
    """Whether the error is the device's: out of memory, or gone. What it computed may have been right."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
