"""One model on every rank, its gradients averaged: torch's DistributedDataParallel, made exact."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .parallel import Parallel, has_sparse_gradients, require_all_used, trainable
from .world import World


class DataParallel(Parallel):
    """The whole model on each rank. All ranks take part in making it."""

    def __init__(self, net: nn.Module, world: World, *, sync_batchnorm: bool = False) -> None:
        super().__init__(net, world, sync_batchnorm=sync_batchnorm)
        self.bare.to(world.device)
        self._wrap()

    def begin_fit(self) -> None:
        before, now = self._trainable.values(), trainable(self.bare).values()
        if list(map(id, before)) != list(map(id, now)):
            self._wrap()

    def _wrap(self) -> None:
        """Have DDP average the gradients of what is trained now, and of nothing else."""
        self.module = self.bare  # the one before lets go of the parameters
        self._trainable = trainable(self.bare)
        device = self.world.device
        if self.world.world_size > 1 and self._trainable:
            wrapped = DistributedDataParallel(
                self.bare,
                device_ids=[device.index] if device.type == "cuda" else None,
                forward_sync_buffers=False,  # batch norm's are each rank's own until `share_buffers`
                gradient_as_bucket_view=True,
            )
            if not has_sparse_gradients(self.bare):  # those travel by themselves, in no bucket with others
                settle_buckets(wrapped)
            self.module = wrapped

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def require_all_used(self, loss: torch.Tensor) -> None:
        if self.module is not self.bare:
            # DDP waits for every parameter's gradient. Found now, since the backward pass would leave the ranks apart.
            require_all_used(self.bare, loss)


def settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Have DDP group its gradients for good, now and always alike. All ranks take part, in a sum of zeros.

    DDP regroups its buckets after the first backward pass of a process, in the order in which the gradients came.
    A sum over three ranks or more depends on the grouping, so that the first step after a resume would add the
    same numbers in another order than the uninterrupted run did. Here the first pass is one through each
    parameter in turn, before any of the model's own: the grouping follows from the model alone.
    """
    net = wrapped.module
    wrapped.module = _TouchAll(net)
    for _ in range(2):  # the second forward regroups
        wrapped().backward()
    wrapped.module = net
    wrapped.zero_grad()


class _TouchAll(nn.Module):
    """Zero, as a sum over the parameters: its backward pass reaches them last to first, as a model's mostly does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.touched = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def forward(self) -> torch.Tensor:
        zero = torch.zeros((), device=self.touched[0].device)
        for parameter in self.touched:
            zero = zero + parameter.sum() * 0
        return zero
