"""The batches that a loop of the user's own has in hand, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from dtrain.errors import UserError

from ..data.indexed import Batch, MicroBatch
from ..strategies.base import Parallel
from .epochs import Epochs
from .tracked import Loader, Tracked


class Hand:
    """What the loop has in hand, and what it has done with it.

    Args:
        models: those that are wrapped, by now.

    Attributes:
        loop: the one over `Ranks.epochs`, if there is one.
        part: the current batch, or micro-batch.
        is_cut: whether batches come in micro-batches.
        is_end_seen: whether the loop has asked if the batch ends.
        scaled: its losses that were scaled.
    """

    def __init__(self, tracked: Tracked, models: Sequence[Parallel]) -> None:
        self.loop: Epochs | None = None
        self.part: MicroBatch | None = None
        self.is_cut = self.is_end_seen = False
        self.scaled: list[Tensor] = []
        self._tracked = tracked
        self._models = models

    @property
    def has_samples(self) -> bool:
        """Whether the current batch counts."""
        return self.part is None or self.part.samples > 0

    @property
    def running(self) -> Epochs | None:
        """The loop that has begun, and is not over."""
        return self.loop if self.loop is not None and self.loop.is_running else None

    def iterate(self, loader: Loader) -> Iterator[Any]:
        """The loader's next epoch, or what was left of it when the run was stopped. All ranks take part."""
        loop, first = self.running, 0
        if loop is None:
            loader.epoch += 1
        elif (begun := loop.state.begin_iteration(loader)) is None:
            return
        else:
            first = begun
        outer = self.part, self.is_cut, self.scaled  # of a loop around this one
        try:
            yield from self._batches(loader, first, loop, outer)
        finally:
            self.part, self.is_cut, self.scaled = outer
            if loop is not None:
                loop.end_iteration(loader)

    def _batches(
        self, loader: Loader, first: int, loop: Epochs | None, outer: tuple[MicroBatch | None, bool, list[Tensor]]
    ) -> Iterator[Any]:
        self._tracked.seed_once()
        for model in self._models:
            model.follow_trained()
            if not first and not model.bare.training:  # about to be evaluated, alike on all ranks
                model.share_buffers()
        batches = iter(loader.batches.epoch(loader.epoch, first))
        while True:
            if loop is not None:
                loop.before_batch(loader)
            if (batch := next(batches, None)) is None:
                return
            if loop is not None:
                loop.hand_out(loader)
            self._tracked.num_batches += 1
            self.is_cut = loader.micro_batch_size is not None
            yield from self._micro_batches(batch)
            self.part, self.is_cut, self.scaled = outer

    def _micro_batches(self, batch: Batch) -> Iterator[Any]:
        self.is_end_seen = False
        for part in batch.micro_batches:
            self.part, self.scaled = part, []
            with contextlib.ExitStack() as undone:
                for model in self._models:
                    undone.enter_context(model.accumulating(last=part.is_last))
                    if not part.samples:
                        undone.enter_context(model.preserving_state())
                yield part.data
            if self.scaled and not (part.is_last or self.is_end_seen):
                raise UserError(
                    "the batch comes in micro-batches, but the loop does not ask where it ends: "
                    "`if ranks.ends_batch: optimizer.step(); optimizer.zero_grad()`"
                )
        if self.scaled:
            for model in self._models:
                model.end_batch(self.scaled)


class Sharded:
    """A rank's shares of a loader's batches. To iterate over it is an epoch; equally many batches on all ranks."""

    def __init__(self, hand: Hand, loader: Loader) -> None:
        self._hand = hand
        self._loader = loader

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration this epoch (from 1), for a loop that resumes by itself."""
        self._loader.epoch = epoch - 1

    def __len__(self) -> int:
        if (steps := self._loader.batches.num_steps) is None:
            raise TypeError("the number of batches is not known before an epoch ends")
        return steps

    def __iter__(self) -> Iterator[Any]:
        return self._hand.iterate(self._loader)
