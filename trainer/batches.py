"""Turns whatever a rank is given to train on or to evaluate into its batches."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from torch.utils.data import DataLoader

from dtrain.errors import Problem, UserError
from dtrain.schema.metrics.sets import clash, name_problem

from .checks.agreement import require_same_data
from .data.indexed import Batches, Data, IndexedBatches, Source
from .data.ready_batches import ReadyBatches
from .distributed.world import World
from .streams.batches import StreamBatches
from .streams.shares import LoaderShares, StreamShares

Sets = Data | Mapping[str, Data]  # what to evaluate on: one set, or several by their names


def by_phase(given: Sets | None, phase: str, metrics: Collection[str] = ()) -> dict[str, Data]:
    """The sets, by what begins the names of their values: val, or val_NAME for each of several; none of None.

    Raises:
        UserError: a name that a set can't have, or can't have beside these metrics.
    """
    if not isinstance(given, Mapping):
        return {} if given is None else {phase: given}
    sets = {f"{phase}_{name}": each for name, each in given.items()}
    problem = name_problem(given) or clash(sets, metrics) if given else "a dict without a set in it"
    if problem is not None:
        raise UserError(Problem(problem, f"data.{phase}"))
    return sets


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
