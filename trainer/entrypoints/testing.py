"""A job's test set, or sets: evaluated once, when training is over, with the best weights in a model of their own.

So nothing that is trained or saved depends on it.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from dtrain.errors import UserError
from dtrain.files import refusal, write_json
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Heartbeat, Phase
from dtrain.stderr import say

from ..batches import Sets, batches_of, by_phase
from ..distributed.stop import Stopped
from ..distributed.wishes import Agreement
from ..fit.evaluation import evaluate_batches, gather_values
from ..metric_trial import try_metrics
from ..trainer import Trainer


def require_fit(trainer: Trainer, test: Sets) -> None:
    """See before training whether model, loss and metrics take the first samples. All ranks take part, each alone.

    Raises:
        UserError: they don't.
    """
    warn = say if trainer.world.is_main else lambda line: None
    with trainer.precision.in_force():
        for phase, each in by_phase(test, "test").items():
            try_metrics(trainer.model, trainer.step, each, trainer.metrics.tally(phase), warn)


def evaluate_best(trainer: Trainer, test: Sets, run: RunDir) -> None:
    """Write the results on the test set, or on each of several, into the run folder. All ranks take part.

    Args:
        trainer: with the run's best weights.

    Raises:
        Stopped: a rank was asked to stop. A run that continues evaluates all of the test set.
    """
    world, model, tallies = trainer.world, trainer.model, []
    model.loss.load(run.best_weights)
    heartbeat = Heartbeat(run.heartbeat(world.rank))
    agreement = Agreement(world, heartbeat)
    at_end = replace(heartbeat.read(), phase=Phase.TESTING)

    def beat(done: int, num_batches: int | None = None) -> None:
        heartbeat.beat(replace(at_end, step_in_epoch=done, steps_in_epoch=num_batches or 0))

    beat(0)
    model.share_buffers()
    for phase, each in by_phase(test, "test").items():
        tallies.append(tally := trainer.metrics.tally(phase))
        fill_empty = model.forwards_together
        batches = batches_of(each, world, trainer.seed, trainer.micro_batch_size, fill_empty=fill_empty)
        shown = functools.partial(beat, num_batches=batches.num_steps)
        with trainer.precision.in_force(), model.evaluating():
            if not evaluate_batches(model, trainer.step, batches.epoch(1), tally, agreement, shown):
                raise Stopped
    values = gather_values(world, tallies)
    if world.is_main:
        try:
            write_json(run.test, values)
        except OSError as error:
            raise UserError(f"training is done, but {run.test} can't be written: {refusal(error)}") from None
    heartbeat.enter(Phase.DONE)
