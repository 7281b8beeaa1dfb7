"""Evaluation: each sample of a dataset once, each rank its own share of them, and the values over all ranks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from dtrain.errors import UserError
from dtrain.run.heartbeat import Phase

from ..checks.optimizer_kinds import judged
from ..data.indexed import Batch, Batches
from ..distributed.seeds import rng_state, set_rng_state
from ..distributed.wishes import Agreement, Wish
from ..distributed.world import World
from ..loss.step import Step
from ..metrics.epoch_totals import Tally
from ..metrics.reduce import reduce_states
from ..strategies.base import Parallel
from .data import FitData
from .progress import Progress
from .trained import Trained


class Validation:
    """The evaluation after an epoch, of the weights and of their average where there is one, on each set."""

    def __init__(self, trained: Trained, data: FitData, progress: Progress) -> None:
        self._trained = trained
        self._data = data
        self._progress = progress
        self._agreement = Agreement(trained.world, progress.heartbeat)

    def run(self) -> bool:
        """Add every validation sample to the tallies, once; False where it was left, since a rank is to stop.

        All ranks take part in the agreement on a stop, and in a sharded forward. Where it is left the run will continue
        with the whole validation, and with the random numbers that it began with.
        """
        if not self._data.val:
            return True
        self._progress.enter(Phase.VALIDATING)
        device = self._trained.world.device
        before = rng_state(device)
        for each in self._data.val:
            for tally in each.tallies:
                with judged(self._trained.optimizer):
                    is_whole = self._evaluate(each.batches, tally)
                if not is_whole:
                    set_rng_state(before, device)
                    for begun in self._data.val_tallies:
                        begun.reset()
                    return False
        return True

    def _evaluate(self, batches: Batches, tally: Tally) -> bool:
        trained, is_of_average = self._trained, tally.phase.startswith("ema")
        averaged = trained.ema.in_place() if trained.ema is not None and is_of_average else contextlib.nullcontext()
        tally.reset()
        beat = functools.partial(self._progress.beat, Phase.VALIDATING, num_batches=batches.num_steps)
        epoch = batches.epoch(self._progress.position.epoch)
        with averaged, trained.model.evaluating():
            return evaluate_batches(trained.model, trained.step, epoch, tally, self._agreement, beat)


def evaluate_batches(
    model: Parallel,
    step: Step,
    batches: Iterator[Batch],
    tally: Tally,
    agreement: Agreement,
    beat: Callable[[int], None],
) -> bool:
    """Add the batches to the tally; False where it was left, since a rank is to stop.

    All ranks take part in the agreement on that, and where `model.forwards_together`.

    Args:
        beat: called with the number of batches done.
    """
    for i, batch in enumerate(batches):
        agreement.ask()
        evaluate_batch(model, step, batch, tally, i)
        beat(i + 1)
        if Wish.STOP in agreement.agreed():
            return False
    return True


def evaluate_all(model: Parallel, step: Step, batches: Batches, tally: Tally) -> None:
    """Add each batch to the tally. All ranks take part where `model.forwards_together`."""
    with model.evaluating():
        for i, batch in enumerate(batches.epoch(1)):
            evaluate_batch(model, step, batch, tally, i)


@torch.no_grad()
def evaluate_batch(model: Parallel, step: Step, batch: Batch, tally: Tally, number: int) -> None:
    """Add this rank's share of batch `number` to the tally. All ranks take part where `model.forwards_together`."""
    for micro_batch in batch.micro_batches:
        if micro_batch.samples:
            tally.add(model.run(step, micro_batch), micro_batch.samples, number)
        else:
            with model.preserving_state():
                model.run(step, micro_batch)


def gather_values(world: World, tallies: Sequence[Tally]) -> dict[str, Any]:
    """The tallies' values over all ranks, on rank 0; empty elsewhere. All ranks take part: one synchronisation."""
    states = [tally.states() for tally in tallies]
    reduced = reduce_states([state for part in states for state in part])
    values: dict[str, Any] = {}
    if reduced is not None and world.is_main:
        for tally, part in zip(tallies, states, strict=True):
            own = tally.finish(reduced[: len(part)])
            if twice := sorted(values.keys() & own.keys()):
                raise UserError(f"two sets report {twice[0]}, one of them is {tally.phase}: rename it, or the value")
            values |= own
            reduced = reduced[len(part) :]
    return values
