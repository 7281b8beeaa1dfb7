"""A model over the ranks, as the loop uses it; the base of the strategies (ddp.py, fsdp.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from .seeds import rng_kept
from .weights import bare_state_dict
from .world import World


class Parallel:
    """A model on each rank, with rank 0's weights and buffers; here is what a strategy may leave as it is.

    Attributes:
        bare: the model under its own names, for evaluation and saving.
        module: what is called in training. Its backward pass averages the gradients over the ranks.
        forwards_together: whether a forward pass is a collective too, in evaluation as in training.
    """

    forwards_together = False

    def __init__(self, net: nn.Module, world: World, *, sync_batchnorm: bool = False) -> None:
        self.world = world
        if sync_batchnorm and world.world_size > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.bare = net
        self.module: nn.Module = net

    def adopt(self, optimizer: Optimizer) -> None:
        """Have an optimizer that was made of the model's parameters train what this rank has of them now."""

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: only the batch's last one averages the gradients."""
        return contextlib.nullcontext()

    def require_all_used(self, loss: Tensor) -> None:
        """Raise UserError where the strategy can't train a model of whose parameters the first loss leaves some out."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation of `bare`."""
        self.bare.eval()
        yield

    def weights(self, instead: Mapping[int, Tensor] | None = None) -> dict[str, Tensor]:
        """The whole model's state_dict, on rank 0; elsewhere nothing that is needed. All ranks take part.

        Args:
            instead: what stands for a parameter of `bare`, by its id.
        """
        return bare_state_dict(self.bare, instead)

    def parts(self) -> dict[str, Tensor]:
        """The parameters of which this rank has only a part, by name, as DTensors."""
        return {}

    @contextlib.contextmanager
    def without_trace(self) -> Iterator[None]:
        """Buffers and random states after the block are what they were before it.

        For a filler's forward and backward, both: autograd refuses buffers that changed in between.
        """
        buffers = [buffer.clone() for buffer in self.bare.buffers()]
        with rng_kept(self.world.device):
            yield
        with torch.no_grad():
            for buffer, before in zip(self.bare.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def share_buffers(self) -> None:
        """Give all ranks rank 0's buffers. All ranks take part, in one broadcast for each dtype."""
        if self.world.world_size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in self.bare.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        with torch.no_grad():
            for buffers in by_dtype.values():
                flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
                dist.broadcast(flat, src=0)
                for buffer, values in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                    buffer.copy_(values.view_as(buffer))
