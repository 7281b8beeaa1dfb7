"""The first samples of a dataset, to try something on them or to look at them: the same ones on all ranks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.data import DataLoader

from dtrain.errors import UserError

from ..distributed.world import World
from .indexed import Data, IndexedBatches, MicroBatch, Source


def unshuffled(data: Data) -> Source:
    """The same samples, in the order of their indices.

    Raises:
        UserError: samples without indices, or others than all.
    """
    if isinstance(data, DataLoader):
        data = Source.of(data)
    if not isinstance(data, Source) or data.is_stream:
        name = type(data.dataset if isinstance(data, Source) else data).__name__
        raise UserError(f"{name} has no order: predict needs a DataLoader over a dataset with indices")
    chosen_by = data.sampling.chosen_by
    if chosen_by is not None or data.batch_size is None or data.drop_last:
        what = "drop_last" if data.drop_last else "batch_size=None" if chosen_by is None else type(chosen_by).__name__
        raise UserError(
            f"predict returns a row for each sample of {type(data.dataset).__name__}, in order: it needs a "
            f"DataLoader with a batch_size and without {what}"
        )
    return replace(data, shuffle=False)


def first_micro_batch(data: Data, most: int, device: torch.device) -> MicroBatch | None:
    """At most so many of the first samples, read by this rank alone; None where they aren't to be had.

    Streams and loaders of the user's own aren't read, since they may not begin anew.
    """
    try:
        source = unshuffled(data)
    except UserError:
        return None
    # In a loading process where there are some: a dataset may open there what can't be handed on to others.
    processes = replace(source.processes, num_workers=min(1, source.processes.num_workers))
    source = replace(source, batch_size=min(most, source.batch_size or most), processes=processes)
    batches = IndexedBatches(source, World(0, 1, device), 0, None, fill_empty=False)
    return next(next(batches.epoch(1)).micro_batches)
