"""SyncBatchNorm on a rank without samples of a batch: it takes part without affecting the statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextlib.contextmanager
def counting_no_sample(net: nn.Module) -> Iterator[None]:
    """Within the block, such layers contribute nothing to all ranks' statistics. No collective but theirs.

    For an empty input torch's layer adds nothing to the statistics, forward or backward, and waits for the others
    all the same. The computation continues with its own statistics.
    """
    with contextlib.ExitStack() as hooks:
        for layer in net.modules():
            if isinstance(layer, nn.SyncBatchNorm):
                withheld = _Withheld()
                hooks.enter_context(layer.register_forward_pre_hook(withheld.before))
                hooks.enter_context(layer.register_forward_hook(withheld.after))
        yield


class _Withheld:
    """What a layer was given, between its two hooks. Only while it trains: else it counts nothing anyway."""

    def __init__(self) -> None:
        self._given: list[Tensor] = []

    def before(self, layer: nn.Module, args: Any) -> Any:
        if not layer.training:
            return None
        (given,) = args
        self._given.append(given)
        # The others' statistics are float32 at least, under autocast too.
        return (given[:0].to(torch.promote_types(given.dtype, torch.float32)),)

    def after(self, layer: Any, args: Any, empty: Tensor) -> Any:
        if not layer.training:
            return None
        own = F.batch_norm(self._given.pop(), None, None, layer.weight, layer.bias, training=True, eps=layer.eps)
        return own + empty.sum().to(own.dtype)  # so that the backward pass, where ranks wait for each other, gets here
