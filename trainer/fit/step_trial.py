"""Trials in the first steps: whether the user's code gives the same result on a batch and on its parts."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import replace
from typing import Any

from dtrain.stderr import say

from ..data.batch_samples import ways_to_take
from ..data.indexed import MicroBatch
from ..distributed.seeds import rng_kept
from ..loss.loss_trial import Pairs, standing_still, try_step
from ..loss.step import Outcome
from .progress import Progress
from .sample_mixing import warn_of_mixing
from .trained import Trained

# A process's steps at which a user's step is tried: one trial may pass by luck.
TRIED_AT = frozenset(10**k for k in range(10))


class StepTrial:
    """Recomputes parts of a batch in some of a process's steps, without side effects.

    All ranks take part where forward passes are collective.
    """

    def __init__(self, trained: Trained, progress: Progress) -> None:
        self._trained = trained
        self._progress = progress
        self._pairs = Pairs()
        self._is_due = False  # since this is a step to do so, or the one before could not

    def look(self, outcome: Outcome, micro_batch: MicroBatch, number: int) -> None:
        """Try the step on micro-batch `number` of the batch, of which the outcome is known, where that is due.

        Raises:
            UserError: the step's loss is not what it is taken for.
        """
        if outcome.believed is not None:
            self._try_step(micro_batch, number)
        elif not self._progress.samples_done and number == 0 and outcome.logs is None:
            self._look_for_mixing(micro_batch)

    def _try_step(self, micro_batch: MicroBatch, number: int) -> None:
        """See that the step's loss is the mean over samples, where batches are cut."""
        is_due = number == 0 and self._progress.steps_done + 1 in TRIED_AT
        self._is_due |= is_due
        is_for_all = self._is_forward_collective
        is_empty = micro_batch.is_whole or not micro_batch.samples
        if not self._is_due or (number != 0 if is_for_all else is_empty):
            return
        data, samples = self._pairs.of(micro_batch.data, micro_batch.samples or 1)
        if samples == 1 and not is_for_all:
            return  # until there is a second one
        self._is_due = is_for_all and is_due  # all ranks together: once more with the next step's, which makes a pair

        def run(data: Any) -> float:
            part = replace(micro_batch, data=data, samples=1, batch_samples=1, is_regular=True)
            outcome = self._run_still(part)
            return float(outcome.total if outcome.believed is None else outcome.believed)

        trained = self._trained
        with trained.model.trying():
            try_step(run, data, samples, trained.world.device, trained.is_coarse, is_forward_collective=is_for_all)

    def _look_for_mixing(self, micro_batch: MicroBatch) -> None:
        """Warn where the loss of this rank's samples depends on which of them make a batch. Of rank 0's it is said."""
        samples, data, world = micro_batch.samples, micro_batch.data, self._trained.world
        ways = [] if micro_batch.is_whole or samples < 2 else ways_to_take(data, samples)
        if len(ways) != 1 and not self._is_forward_collective:
            return
        cut = samples // 2
        losses: list[tuple[float, float]] = []
        # Training will report what fails here.
        with contextlib.suppress(Exception), rng_kept(world.device), self._trained.model.trying():
            for rows in (range(samples), range(samples), range(cut), range(cut, samples)):
                taken = ways[0](rows) if len(ways) == 1 else data  # of a rank that only takes part
                outcome = self._run_still(replace(micro_batch, data=taken, samples=len(rows), is_whole=True))
                losses.append((float(outcome.total), len(rows) if outcome.weight is None else float(outcome.weight)))
        if world.is_main and len(ways) == 1 and len(losses) == 4:
            is_coarse = self._trained.is_coarse
            warn_of_mixing(losses, samples, lambda line: say(f"warning: {line}"), is_coarse=is_coarse)

    def _run_still(self, micro_batch: MicroBatch) -> Outcome:
        """The outcome of a step that changes nothing."""
        with standing_still(self._trained.model.bare, inspect.unwrap(self._trained.step)):
            return self._trained.model.run(self._trained.step, micro_batch)

    @property
    def _is_forward_collective(self) -> bool:
        return self._trained.model.forwards_together and self._trained.world.world_size > 1
