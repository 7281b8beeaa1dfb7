"""Batch norm on several ranks: each rank normalises by the statistics of its own share of a batch."""

from __future__ import annotations

from torch import nn

from dtrain.stderr import say

from ..distributed.torch_private import BATCH_NORMS
from ..distributed.world import World

ENOUGH = 16  # samples: the mean and variance of fewer are too noisy to train well with


def is_per_rank(layer: nn.Module) -> bool:
    """Whether the layer is a batch norm whose statistics each rank computes by itself."""
    return isinstance(layer, BATCH_NORMS) and not isinstance(layer, nn.SyncBatchNorm)


def warn_of_small_shares(net: nn.Module, batch_samples: int, world: World) -> None:
    """Warn, on rank 0, if splitting a batch leaves batch norm few samples. No collective.

    Args:
        net: in training mode; layers in evaluation mode, such as a frozen backbone's, do not count.
        batch_samples: over all ranks.
    """
    share = batch_samples // world.world_size
    if not world.is_main or world.world_size == 1 or share >= ENOUGH:
        return
    if any(is_per_rank(layer) and layer.training for layer in net.modules()):
        say(
            f"warning: the model has batch norm, which normalises over each rank's share of a batch: {batch_samples} "
            f"samples on {world.world_size} ranks are {share} a rank, and with fewer than {ENOUGH} the result depends "
            "on the number of ranks; use a larger batch or fewer ranks, fit.sync_batchnorm (on CUDA), or a norm that "
            "does not look across samples, such as GroupNorm"
        )
