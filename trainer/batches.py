"""Turns whatever a rank is given to train on or to evaluate into its batches."""

from __future__ import annotations

from typing import Any, cast

from torch.utils.data import DataLoader

from dtrain.errors import UserError

from .checks.agreement import require_same_data
from .data.indexed import Batches, Data, IndexedBatches, Source
from .data.ready_batches import ReadyBatches
from .distributed.world import World
from .streams.batches import StreamBatches
from .streams.shares import LoaderShares, StreamShares


def batches_of(
    data: Data, world: World, seed: int, micro_batch_size: int | None = None, *, fill_empty: bool
) -> Batches:
    """This rank's batches of a DataLoader, of a dataset with or without indices, or of a loader of the user's own.

    Args:
        fill_empty: see `IndexedBatches`.

    All ranks take part, to see that they were given the same.

    Raises:
        UserError: it can't be read this way.
    """
    source = Source.of(data) if isinstance(data, DataLoader) else data
    if isinstance(source, list | tuple):
        source = Source(cast(Any, source), None, shuffle=False)  # all ranks have all the batches
    require_same_data(world, source)
    if not isinstance(source, Source):
        own = LoaderShares(source, world, seed)
        if micro_batch_size is not None:
            raise UserError(f"micro_batch_size has no effect on batches that {own.name} makes; leave it out")
        return StreamBatches(own, world, fill_empty=fill_empty)
    seed = source.seed(seed, world)
    if source.is_stream:
        shares = StreamShares(source, world, seed, micro_batch_size, fill_empty=fill_empty)
        return StreamBatches(shares, world, fill_empty=fill_empty)
    kind = ReadyBatches if source.is_ready else IndexedBatches
    return kind(source, world, seed, micro_batch_size, fill_empty=fill_empty)
