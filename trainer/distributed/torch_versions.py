"""What older versions of torch, from 2.11 on, lack; and which errors come from a device."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion

# Losses that are the weighted mean over class numbers, as CrossEntropyLoss, and not of every version.
LINEAR_CROSS_ENTROPY: tuple[Any, ...] = (nn.LinearCrossEntropyLoss,) if hasattr(nn, "LinearCrossEntropyLoss") else ()

# How DistributedDataParallel is told to leave buffers alone in forward passes.
_ARGUMENTS = inspect.signature(DistributedDataParallel.__init__).parameters
BUFFERS_APART: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers": False
}

# How torch is told to take as much pinned memory as is asked for. By itself it rounds up to a power of two.
_EXACT_PINNING = "pinned_max_round_threshold_mb:1"


def pin_exactly() -> None:
    """Let pinned copies take the memory that they need, unless the user has settings of their own for it.

    To be called before the device is first used. 2.15 is the first version in which this was seen to be known.
    """
    asked = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if not asked and TorchVersion(torch.__version__) >= "2.15":
        os.environ["PYTORCH_ALLOC_CONF"] = _EXACT_PINNING


def is_of_device(error: BaseException) -> bool:
    """Whether the error is the device's: out of memory, or gone. What it computed may have been right."""
    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
