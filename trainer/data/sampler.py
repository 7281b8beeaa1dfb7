"""A user's samplers, and what they draw for an epoch: drawn on rank 0, the same on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtrain.errors import UserError

from ..distributed.seeds import derive_seed, loading_apart, seed_loading
from ..distributed.world import World

MOST = 10**7  # samples, or batches, of an epoch whose sampler says no length: it may have no end


@dataclass(frozen=True)
class Sampling:
    """What draws an epoch's order in place of a permutation of ours, by a DataLoader's own names."""

    sampler: Iterable[Any] | None = None
    batch_sampler: Iterable[Sequence[Any]] | None = None  # draws the batches too
    generator: torch.Generator | None = None  # its seed counts in addition to the run's

    @property
    def chosen_by(self) -> Iterable[Any] | None:
        """The sampler or batch sampler that chooses an epoch's samples; None: all of them are taken."""
        return self.sampler if self.batch_sampler is None else self.batch_sampler

    @property
    def samplers(self) -> tuple[Any, ...]:
        """All samplers that take part, None for those that there are not."""
        return self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None)

    @property
    def initial_seed(self) -> int | None:
        """What the first generator that was given was seeded with."""
        given = [self.generator, *(getattr(each, "generator", None) for each in self.samplers)]
        return next((each.initial_seed() for each in given if isinstance(each, torch.Generator)), None)


def length(sized: Any) -> int | None:
    """Its len(), where it has one."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError, AttributeError):
        return None


def draw_samples(sampler: Iterable[Any], seed: int, epoch: int, world: World) -> NDArray[Any]:
    """What the sampler calls an epoch's samples by, in their order. All ranks take part: they get it from rank 0.

    Raises:
        UserError: it draws more or fewer than its length, nothing at all, or without an end.
    """
    expected, name = length(sampler), type(sampler).__name__
    drawn: list[Any] = []
    if world.is_main:
        with _seeded([sampler], seed, epoch):
            drawn = list(islice(sampler, (expected or MOST) + 1))
    drawn = world.from_main(drawn)
    if expected is None and len(drawn) > MOST:
        raise UserError(f"{name} has no length and drew more than {MOST:,} samples: give it __len__ if it is finite")
    if expected not in (None, len(drawn)):
        count = len(drawn) if len(drawn) < expected else f"more than {expected}"
        raise UserError(f"{name} drew {count} samples for epoch {epoch}, but its length is {expected}")
    if not drawn:
        raise UserError(f"{name} drew no samples for epoch {epoch}")
    return _as_array(drawn)


def draw_batches(
    sampler: Iterable[Sequence[Any]], seed: int, epoch: int, world: World
) -> tuple[NDArray[Any], tuple[int, ...]]:
    """What a batch sampler calls an epoch's samples by, and how many there are up to each batch's end.

    All ranks take part: they get it from rank 0. Its length may be an estimate.

    Raises:
        UserError: it draws an empty batch, none, or without an end.
    """
    expected, name = length(sampler), type(sampler).__name__
    most = 2 * expected if expected else MOST
    drawn: list[list[Any]] = []
    if world.is_main:
        with _seeded([sampler, getattr(sampler, "sampler", None)], seed, epoch):
            drawn = [list(batch) for batch in islice(sampler, most + 1)]
    drawn = world.from_main(drawn)
    if len(drawn) > most:
        raise UserError(f"{name} draws more than {most:,} batches, its length is {expected}: an epoch must have an end")
    if not drawn or not all(drawn):
        raise UserError(f"{name} drew {'an empty batch' if drawn else 'no batch'} for epoch {epoch}")
    return _as_array(list(chain.from_iterable(drawn))), tuple(accumulate(map(len, drawn)))


@contextlib.contextmanager
def _seeded(samplers: list[Any], seed: int, epoch: int) -> Iterator[None]:
    """In the block, what the samplers draw follows from seed and epoch; afterwards all generators are as before."""
    key = derive_seed("order", seed, epoch)
    with loading_apart(), contextlib.ExitStack() as undone:
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
                undone.callback(generator.set_state, generator.get_state())
                generator.manual_seed(key)
        seed_loading(key)
        yield


def _as_array(items: list[Any]) -> NDArray[Any]:
    if all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in items):
        return np.fromiter(items, np.int64, len(items))
    return np.fromiter(items, object, len(items))
