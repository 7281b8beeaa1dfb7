"""A fit's description: to check that all ranks were given the same, and for comparing runs in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ..checks.arguments import Settings
from ..model.optimizers import Optimizers
from ..optimization.scheduling import Scheduling
from .data import FitData


def alike(
    settings: Settings, loss: Any, optimizer: Any, scheduling: Scheduling, data: FitData, metrics: Mapping[str, Any]
) -> Any:
    """What must be the same on all ranks, by name, besides the model and the samples.

    Args:
        loss: what makes it.
    """
    fit = settings.fit.model_dump(exclude={"early_stopping", "restarts"})
    stopping = {} if settings.fit.early_stopping is None else settings.fit.early_stopping.model_dump()
    found = {**fit, **stopping, "loss": loss, "metrics": sorted(metrics)}
    members = optimizer.members if isinstance(optimizer, Optimizers) else {"": optimizer}
    found |= {_path("optimizer", name): each for name, each in members.items()}
    for name, each in scheduling.schedules.items():
        found[_path("scheduler", name)] = f"{full_name(each.scheduler)}, each {each.interval}"
    found["phases"] = [tally.phase for tally in data.tallies]
    checkpoint = settings.checkpoint
    return found | {"seed": settings.seed, "checkpoint_every": checkpoint.every, "keep": checkpoint.keep}


def job_of(name: str, seed: int, model: str, optimizer: Any, scheduling: Scheduling, metrics: Mapping[str, Any]) -> str:
    """A script's run as the text of a job.yaml, of what is known of it.

    Args:
        model: its full name, which it had before a strategy may have changed its class.
    """
    parts: dict[str, Any] = {"name": name, "seed": seed, "model": {"_target_": model}}
    if isinstance(optimizer, Optimizers):
        parts["optimizer"] = {name: _described(each) for name, each in optimizer.members.items()}
    elif optimizer is not None:
        parts["optimizer"] = _described(optimizer)
    schedules = {
        name: {"_target_": full_name(each.scheduler), "interval": each.interval}
        for name, each in scheduling.schedules.items()
    }
    if schedules:
        parts["scheduler"] = schedules.get("", schedules)
    parts["metrics"] = {
        key: {"_target_": full_name(getattr(metric, "function", metric))} for key, metric in metrics.items()
    }
    return yaml.safe_dump(parts, sort_keys=False)


def _described(optimizer: Any) -> dict[str, Any]:
    defaults = getattr(optimizer, "defaults", {})  # one that wraps another may have none
    plain = {key: value for key, value in defaults.items() if isinstance(value, (int, float, str, bool))}
    return {"_target_": full_name(optimizer), **plain}


def _path(key: str, name: str) -> str:
    return f"{key}.{name}" if name else key


def full_name(value: object) -> str:
    """The importable name of its class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
