"""A job's test set: evaluated once, when training is over, with the best weights in a model of their own.

So nothing that is trained or saved depends on it.
"""

from __future__ import annotations

from dataclasses import replace

from dtrain.errors import UserError
from dtrain.files import refusal, write_json
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Heartbeat, Phase
from dtrain.stderr import say

from ..batches import batches_of
from ..data.indexed import Source
from ..distributed.stop import Stopped
from ..distributed.wishes import Agreement
from ..fit.evaluation import evaluate_batches, gather_values
from ..metric_trial import try_metrics
from ..trainer import Trainer


def require_fit(trainer: Trainer, test: Source) -> None:
    """See before training whether model, loss and metrics take the first samples. All ranks take part, each alone.

    Raises:
        UserError: they don't.
    """
    warn = say if trainer.world.is_main else lambda line: None
    with trainer.precision.in_force():
        try_metrics(trainer.model, trainer.step, test, trainer.metrics.tally("test"), warn)


def evaluate_best(trainer: Trainer, test: Source, run: RunDir) -> None:
    """Write the results on the test set into the run folder. All ranks take part.

    Args:
        trainer: with the run's best weights.

    Raises:
        Stopped: a rank was asked to stop. A run that continues evaluates all of the test set.
    """
    world, model, tally = trainer.world, trainer.model, trainer.metrics.tally("test")
    model.loss.load(run.best_weights)
    fill_empty = model.forwards_together
    batches = batches_of(test, world, trainer.seed, trainer.micro_batch_size, fill_empty=fill_empty)
    heartbeat = Heartbeat(run.heartbeat(world.rank))
    at_end = replace(heartbeat.read(), phase=Phase.TESTING, steps_in_epoch=batches.num_steps or 0)

    def beat(done: int) -> None:
        heartbeat.beat(replace(at_end, step_in_epoch=done))

    beat(0)
    model.share_buffers()
    with trainer.precision.in_force(), model.evaluating():
        agreement = Agreement(world, heartbeat)
        if not evaluate_batches(model, trainer.step, batches.epoch(1), tally, agreement, beat):
            raise Stopped
    values = gather_values(world, [tally])
    if world.is_main:
        try:
            write_json(run.test, values)
        except OSError as error:
            raise UserError(f"training is done, but {run.test} can't be written: {refusal(error)}") from None
    heartbeat.enter(Phase.DONE)
