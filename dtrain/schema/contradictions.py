"""Settings that are valid by themselves but contradict each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from dtrain.errors import Problem, among
from dtrain.schema import sbatch
from dtrain.schema.job import Job, ScriptJob
from dtrain.schema.metrics.monitor import monitor_problem
from dtrain.schema.metrics.sets import clash, monitor_missing, phase_of
from dtrain.schema.sections import Fit, Slurm
from dtrain.schema.strategies import STRATEGIES
from dtrain.schema.targets import OptimizerTarget, SchedulerTarget, Target


def contradictions_of(fit: Fit) -> list[Problem]:
    """Contradictions between settings of this section that are valid by themselves."""
    problems = []
    if fit.epochs is None and fit.steps is None:
        problems.append(Problem("missing; give epochs, steps, or both", "fit.epochs"))
    if fit.early_stopping and fit.early_stopping.min_delta and fit.early_stopping.patience is None:
        problems.append(Problem("has no effect without patience", "fit.early_stopping.min_delta"))
    if fit.clip_norm and fit.clip_value:
        problems.append(Problem("is a second way of clipping; give either clip_norm or clip_value", "fit.clip_value"))
    if fit.unused_parameters == "allow" and not STRATEGIES[fit.strategy].is_plain:
        message = "allow works with ddp only: under the others ranks gather and sum the same parameters in each step"
        problems.append(Problem(message, "fit.unused_parameters"))
    if fit.strategy == "deepspeed":
        message = "DeepSpeed lays out what is trained once, before the first step: use ddp or fsdp, or freeze for good"
        later = (number for number, entry in enumerate(fit.freeze) if entry.until is not None)
        problems += [Problem(message, f"fit.freeze.{number}.until") for number in later]
    if fit.precision == "fp16" and fit.on_nonfinite == "stop":
        message = "fp16's gradient scaler skips steps that overflow, so it can't stop at them; use skip, or bf16"
        problems.append(Problem(message, "fit.on_nonfinite"))
    return problems


def contradictions(job: Job) -> list[Problem]:
    """Contradictions between fields that are valid by themselves."""
    problems = []
    if job.loss and job.step:
        problems.append(Problem("returns its own loss; give either loss or step", "step"))
    if not job.loss and not job.step:
        problems.append(Problem("missing; give loss or step", "loss"))
    problems += contradictions_of(job.fit)
    problems += STRATEGIES[job.fit.strategy].disagreements(job)
    for section in STRATEGIES:
        if section in job.model_fields_set and section != job.fit.strategy and not job.is_default(section):
            problems.append(Problem("settings for a strategy that fit.strategy does not select", section))
    for place, scheduler in job.schedulers.items():
        if re.fullmatch(r"torch\.optim\.[A-Z]\w*", scheduler.target):
            message = "is an optimizer, not a scheduler; torch's schedulers are in torch.optim.lr_scheduler"
            problems.append(Problem(message, f"{place}._target_"))
    if job.fit.validate_every != "epoch" and not job.data.val:
        problems.append(Problem("there is nothing to validate: give data.val", "fit.validate_every"))
    for section in ("val", "test"):
        if problem := clash([phase_of(place) for place in job.data.places(section)], job.metrics):
            problems.append(Problem(problem, f"data.{section}"))
    if job.stopping.monitor is None and (missing := monitor_missing(job.val_phases)):
        problems.append(Problem(missing, "fit.early_stopping.monitor"))
    problems += [each for path, name in job.monitors.items() for each in _wrong_monitor(job, name, path)]
    for place, scheduler in job.schedulers.items():
        problems += _wrong_plateau(job, scheduler, place)
    for place, optimizer in job.optimizers.items():
        problems += _wrong_rates(optimizer, place)
    problems += _wrong_names(job)
    return problems + wrong_slurm_options(job)


def _wrong_rates(optimizer: OptimizerTarget, place: str) -> Iterator[Problem]:
    """Learning rates that are none, and factors of one that nobody knows, or beside another one."""
    rate = optimizer.arguments.get("lr")
    settings = [(place, optimizer.arguments)]
    settings += [(f"{place}.groups.{i}", group.model_extra or {}) for i, group in enumerate(optimizer.groups)]
    for path, given in settings:
        if "lr" in given and not _is_rate(given["lr"], optimizer.target):
            yield Problem(f"expected a positive number, found {given['lr']!r}", f"{path}.lr")
    for i, group in enumerate(optimizer.groups):
        path = f"{place}.groups.{i}.lr_factor"
        if group.lr_factor is not None and "lr" in (group.model_extra or {}):
            yield Problem("is a second learning rate; give either lr or lr_factor", path)
        elif group.lr_factor is not None and not isinstance(rate, int | float):
            yield Problem(f"is a multiple of {place}.lr, which must be a number then", path)


def _wrong_names(job: Job) -> Iterator[Problem]:
    """Several optimizers that want the same parameters, or a scheduler of none of them."""
    members = {} if isinstance(job.optimizer, Target) else job.optimizer
    without = [name for name, each in members.items() if not each.params]
    for name in without[1:]:
        message = f"missing; only one optimizer can train what no other does, and {without[0]} has no params either"
        yield Problem(message, f"optimizer.{name}.params")
    for name in [] if job.scheduler is None or isinstance(job.scheduler, Target) else job.scheduler:
        if name not in members:
            yield Problem(f"no optimizer is called {name}; {among(name, sorted(members))}", f"scheduler.{name}")
    if members and job.fit.strategy == "deepspeed":
        yield Problem("DeepSpeed trains with one optimizer; several need ddp or fsdp", "optimizer")


def _wrong_monitor(job: Job, monitor: str, path: str) -> list[Problem]:
    if not (problem := monitor_problem(monitor, job.reported, may_log=job.step is not None)):
        return []
    if monitor.startswith("val_") and not job.data.val:
        problem = f"nothing is reported as {monitor}; without data.val there is no validation"
    return [Problem(problem, path)]


def _wrong_plateau(job: Job, scheduler: SchedulerTarget, place: str) -> list[Problem]:
    """A scheduler that would mistake a better value for a worse one."""
    if scheduler.target.rpartition(".")[2] != "ReduceLROnPlateau":
        return []
    mode, watched = scheduler.arguments.get("mode", "min"), scheduler.monitor or job.monitor
    known = job.stopping.mode if watched == job.monitor else "min" if watched.endswith("_loss") else mode
    if mode == known or mode not in ("min", "max"):
        return []
    better = "lower" if known == "min" else "higher"
    message = f"its mode is {mode}, but it monitors {watched}, for which {better} is better"
    return [Problem(message, place, hint=f"mode: {known}, or another value as {place}.monitor")]


def _is_rate(value: object, optimizer: str) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0 <= value < math.inf
    # A target may create a tensor; and optimizers that find their own learning rate take null.
    return isinstance(value, dict) or (value is None and not optimizer.startswith("torch."))


def wrong_slurm_options(job: Job | ScriptJob) -> list[Problem]:
    """Options that sbatch would refuse, or that dtrain sets itself."""
    found = ((name, sbatch.problem(name, value, Slurm.model_fields)) for name, value in job.slurm.extra.items())
    problems = [Problem(message, f"slurm.{name}") for name, message in found if message]
    problems += [Problem("holds a NUL character", f"slurm.{path}") for path, text in job.slurm.texts() if "\0" in text]
    return problems
