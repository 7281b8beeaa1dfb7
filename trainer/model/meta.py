"""A model without values, on the meta device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..distributed.torch_private import tree_leaves


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module | None:
    """A model without values, for ranks that get them from rank 0; None where its class can't be built so.

    A constructor that computes with values (`.item()`), or keeps tensors that are neither parameters nor buffers,
    needs them.
    """
    try:
        with torch.device("meta"):
            net = build()
    except Exception:  # whatever it meets; rank 0 meets it too where it is no matter of the device
        return None
    attributes = [{**vars(module), "_parameters": None, "_buffers": None} for module in net.modules()]
    return None if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(attributes)) else net
