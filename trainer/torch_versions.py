"""What older versions of torch, from 2.6 on, lack: the one place that tells them apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Losses that are the weighted mean over class numbers, as CrossEntropyLoss, and not of every version.
LINEAR_CROSS_ENTROPY: tuple[Any, ...] = (nn.LinearCrossEntropyLoss,) if hasattr(nn, "LinearCrossEntropyLoss") else ()


def is_of_device(error: BaseException) -> bool:
    """Whether the error is the device's: out of memory, or gone. What it computed may have been right."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if hasattr(torch, "AcceleratorError"):  # torch 2.8
        return isinstance(error, torch.AcceleratorError)
    return isinstance(error, RuntimeError) and "CUDA error:" in str(error)
