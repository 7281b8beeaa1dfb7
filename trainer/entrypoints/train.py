"""One rank of a job: builds what the run's job.yaml names, and trains it. An ordinary torchrun script.

Run as `python -m dtrain.trainer.entrypoints.train REQUEST`, with DTRAIN_RUN_DIR naming the run folder and torchrun's
variables naming the rank. REQUEST is a `Train` in JSON.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader

from dtrain.errors import Problem, UserError
from dtrain.names import job_path
from dtrain.references.marks import STEPS, STEPS_PER_EPOCH, about_the_run, fill
from dtrain.run.folder import EXIT_STOPPED, RUN_DIR_VARIABLE, RunDir
from dtrain.run.rank_request import RankRequest, Train
from dtrain.schema.instantiate import bind_function, build_metric, instantiate
from dtrain.schema.job import Job
from dtrain.schema.loading import load_job
from dtrain.schema.strategies import STRATEGIES
from dtrain.schema.targets import OptimizerTarget, SchedulerTarget, Target
from dtrain.stderr import say

from ..callbacks.profiler import Profiler
from ..checks.arguments import OF_THE_RUN, require_model
from ..data.indexed import Source
from ..data.sampler import Sampling
from ..data.workers import Processes
from ..distributed.seeds import derive_seed, rng_kept, seed_everything
from ..distributed.stop import Stopped
from ..distributed.world import own_device
from ..fit_folder import continues
from ..loss.user_step import user_step
from ..model.loading import begin_from, load_weights
from ..model.meta import build_on_meta
from ..model.weights import without_shape
from ..optimization.param_groups import Named, grouped, named_parameters, rates_apart, shared_out
from ..optimization.run_length import RunLength
from ..predict import predict_features
from ..trainer import Trainer
from .lazy_shapes import give_shapes
from .testing import evaluate_best, require_fit


def main() -> int:
    """Train this rank's part of the run; the exit code."""
    asked = Train.read()
    run, job = begin(asked)
    try:
        fit(run, job, [Profiler.of(asked.profile)] if asked.profile else [])
    except Stopped:
        return EXIT_STOPPED
    return 0


def begin(request: RankRequest) -> tuple[RunDir, Job]:
    """The run of which this process is a rank, and its job, whose modules can be imported from here on."""
    run = RunDir(os.environ[RUN_DIR_VARIABLE])
    job = load_job(run.job).job
    job_path(Path(request.code))
    return run, job


def fit(run: RunDir, job: Job, callbacks: Sequence[Any] = ()) -> None:
    """Build the job's parts, train, and evaluate the test set. All ranks take part.

    Args:
        callbacks: beside the job's own.
    """
    written, (job, train) = job, settle(job)
    trainer = build_trainer(job, callbacks=callbacks)
    test = build_sets(job, "test")
    if test is not None:
        require_fit(trainer, test)
    loop = trainer.train(
        train or build_source(job, "train", training=True),
        build_sets(job, "val"),
        epochs=job.fit.epochs,
        steps=job.fit.steps,
        early_stopping={**job.stopping.model_dump(), "monitor": job.monitor},
    )
    trainer.draw(loop)
    if test is not None:
        trainer.world.barrier()  # the best weights are written
        evaluate_best(build_trainer(settle(written, is_trained=True)[0], run.best_weights), test, run)


def settle(
    job: Job, part: Callable[[Source], Source] = lambda source: source, *, is_trained: bool = False
) -> tuple[Job, Source | None]:
    """The job as it is meant, with the run's numbers where it refers to them, and the training data if it does.

    Args:
        part: what is trained on, of that data.
        is_trained: whether there will be no optimizer: what it mentions does not matter then.

    Raises:
        UserError: the data does not know its length.
    """
    values, source = job.model_dump(by_alias=True), None
    numbers: dict[str, int] = {}
    if is_trained:
        values |= {
            "optimizer": {"_target_": next(iter(job.optimizers.values())).target},
            "scheduler": None,
            "callbacks": [],
        }
    if mentions := about_the_run(values):
        own_device(job.launch.device)  # before what is built puts something on a GPU
        source = part(build_source(job, "train", training=True))
        length = RunLength.of(job.fit, source.num_steps)
        for name, number, mend in (
            (STEPS, length.steps, "set fit.steps"),
            (STEPS_PER_EPOCH, length.steps_per_epoch, "write the number"),
        ):
            if number is not None:
                numbers[name] = number
            elif path := next((path for path, names in mentions.items() if name in names), None):
                message = f"{type(source.dataset).__name__} has no length, so {name} cannot be known in advance"
                raise UserError(Problem(message, path, hint=f"give it a __len__, or {mend}"))
    return Job.model_validate(fill(values, numbers)), source


def build_trainer(job: Job, trained: Path | None = None, callbacks: Sequence[Any] = ()) -> Trainer:
    """The job's model, loss, optimizer, scheduler and metrics in a Trainer.

    Args:
        trained: weights to load, in a Trainer that is to evaluate and predict: it has no optimizer.
        callbacks: after the job's own.
    """
    own_device(job.launch.device)  # before what is built puts something on a GPU
    net = build_model(job, trained)
    # What is built next may draw too, and ranks that drew no weights must not differ from the others.
    seed_everything(derive_seed("built", job.seed))
    loss = None if job.loss is None else cast(Any, instantiate(job.loss))
    optimizer = None if trained is not None else build_optimizer(job, net, loss)
    metrics = {name: build_metric(target) for name, target in job.metrics.items()}
    return Trainer(
        net,
        loss,
        optimizer,
        metrics,
        step=None if job.step is None else bind_function(job.step),
        **build_schedulers(job, optimizer),
        activations={name: target.activation for name, target in job.metrics.items()},
        train_metrics=_train_metrics(job, metrics),
        callbacks=[*(instantiate(each) for each in job.callbacks), *callbacks] if trained is None else (),
        seed=job.seed,
        device=job.launch.device,
        strategy=getattr(job, job.fit.strategy, job.fit.strategy),  # its section, if it has one
        checkpoint_every=job.checkpoint.every,
        keep=job.checkpoint.keep,
        keep_every=job.checkpoint.keep_every,
        **job.fit.model_dump(exclude=OF_THE_RUN | {"strategy"}),
    )


def build_model(job: Job, trained: Path | None) -> nn.Module:
    """The job's model; where ranks keep parts of it, without values on all but rank 0, from which they get theirs.

    Args:
        trained: weights to load.
    """

    def build(*, may_be_lazy: bool = False) -> nn.Module:
        seed_everything(job.seed)  # the same weights on all ranks, and for any number of them
        net: nn.Module = instantiate(job.model)
        require_model(net, may_be_lazy=may_be_lazy)
        return net

    if STRATEGIES[job.fit.strategy].from_meta and int(os.environ["RANK"]) > 0:
        without_values = build_on_meta(build)
        if without_values is not None:
            return without_values
    net = build(may_be_lazy=True)
    if trained is not None:
        load_weights(net, trained)
    elif without_shape(net):
        step = predict_features if job.step is None else user_step(bind_function(job.step))
        with rng_kept(torch.device("cpu")):
            source = build_source(job, "train", training=True)
        give_shapes(net, step, source)
        require_model(net)
    if job.init_from is not None and trained is None and not continues():
        begin_from(net, job.init_from, say if int(os.environ["RANK"]) == 0 else lambda line: None)
    return net


def build_optimizer(job: Job, net: nn.Module, loss: Any) -> Any:
    """The job's optimizer, of the model's parameters and the loss's, in their groups; or several by their names."""
    parameters = named_parameters(net, loss)
    if isinstance(job.optimizer, OptimizerTarget):
        return _build_optimizer(job.optimizer, parameters, "optimizer")
    shares = shared_out(parameters, job.optimizer)
    return {name: _build_optimizer(each, shares[name], f"optimizer.{name}") for name, each in job.optimizer.items()}


def _build_optimizer(target: OptimizerTarget, parameters: Sequence[Named], path: str) -> Any:
    groups = grouped(parameters, target.groups, target.arguments.get("lr"), path)
    with _refusals(path, target):
        return instantiate(target, groups)


def build_schedulers(job: Job, optimizer: Any) -> dict[str, Any]:
    """Trainer's arguments about the scheduler; for several optimizers, about theirs by name."""
    given = job.scheduler
    if given is None or optimizer is None:
        return {}
    if isinstance(optimizer, Mapping):
        by_name = dict.fromkeys(optimizer, given) if isinstance(given, SchedulerTarget) else given
        return {
            "scheduler": {name: _build_scheduler(each, optimizer[name], name) for name, each in by_name.items()},
            "scheduler_interval": {name: each.interval for name, each in by_name.items()},
            "scheduler_monitor": {name: each.monitor for name, each in by_name.items()},
        }
    assert isinstance(given, SchedulerTarget)  # several are of several optimizers
    made = _build_scheduler(given, optimizer)
    return {"scheduler": made, "scheduler_interval": given.interval, "scheduler_monitor": given.monitor}


def _build_scheduler(target: SchedulerTarget, optimizer: Any, name: str = "") -> Any:
    """A scheduler, which may be made of others: each gets the optimizer."""
    path = f"scheduler.{name}" if name else "scheduler"
    with _refusals(path, target), rates_apart(optimizer, path):
        return instantiate(target, optimizer, given={"optimizer": optimizer})


@contextlib.contextmanager
def _refusals(path: str, target: Target) -> Iterator[None]:
    """Around building a part of torch's: if it refuses its arguments, the error names their key."""
    try:
        yield
    except (TypeError, ValueError, AttributeError) as error:
        if target.target.startswith("torch."):
            raise UserError(Problem(f"{target.target}: {type(error).__name__}: {error}", path)) from error
        raise


def build_sets(
    job: Job, section: str, part: Callable[[Source], Source] = lambda source: source
) -> Source | dict[str, Source] | None:
    """The datasets of val or test: one, or several by their names; or that of val.NAME.

    Args:
        part: what is used of each.
    """
    found = {place: part(build_source(job, place, training=False)) for place in job.data.places(section)}
    return found.get(section) or {place.rpartition(".")[2]: each for place, each in found.items()} or None


def build_source(job: Job, name: str, *, training: bool) -> Source:
    """The dataset at that place in the job's data, with the job's way of reading it.

    What it draws (a random_split) is the same for training and validation, on all ranks and in `dtrain evaluate`.
    """
    seed_everything(derive_seed("data", job.seed))
    collate = None if job.data.collate is None else bind_function(job.data.collate)
    dataset: Any = instantiate(job.data.sets[name])
    if isinstance(dataset, DataLoader):
        message = (
            "makes a DataLoader, but a job needs the dataset in it: data.batch_size, shuffle and workers set the rest"
        )
        raise UserError(Problem(message, f"data.{name}"))
    sampler: Any = instantiate(job.data.sampler, dataset) if training and job.data.sampler else None
    shuffle, processes = training and job.data.shuffle, Processes(job.data.workers)
    try:
        return Source(dataset, job.data.batch_size, shuffle, processes, collate, Sampling(sampler))
    except UserError as error:  # it has no samples, or no length
        raise UserError(Problem(str(error), f"data.{name}")) from None


def _train_metrics(job: Job, metrics: dict[str, Any]) -> list[str]:
    """The metrics that run on training too: as asked, else those that do not keep all samples."""
    if not metrics:
        return []
    from ..metrics.given_metrics import as_metrics, keeps_samples

    asked = {name: target.train for name, target in job.metrics.items()}
    made = as_metrics(metrics)
    return [name for name, want in asked.items() if want or (want is None and not keeps_samples(made[name]))]


if __name__ == "__main__":
    sys.exit(main())
