"""A fit's description: to check that all ranks were given the same, and for comparing runs in MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from ..checks.arguments import Settings
from ..optimization.scheduler import Scheduling
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
    found = {**fit, **stopping, "loss": loss, "optimizer": optimizer, "metrics": sorted(metrics)}
    if scheduling.scheduler is not None:
        found |= {"scheduler": full_name(scheduling.scheduler), "scheduler_interval": scheduling.interval}
    found["phases"] = [tally.phase for tally in data.tallies]
    checkpoint = settings.checkpoint
    return found | {"seed": settings.seed, "checkpoint_every": checkpoint.every, "keep": checkpoint.keep}


def job_of(name: str, seed: int, model: str, optimizer: Any, scheduling: Scheduling, metrics: Mapping[str, Any]) -> str:
    """A script's run as the text of a job.yaml, of what is known of it.

    Args:
        model: its full name, which it had before a strategy may have changed its class.
    """
    parts: dict[str, Any] = {"name": name, "seed": seed, "model": {"_target_": model}}
    if optimizer is not None:
        defaults = getattr(optimizer, "defaults", {})  # one that wraps another may have none
        plain = {key: value for key, value in defaults.items() if isinstance(value, (int, float, str, bool))}
        parts["optimizer"] = {"_target_": full_name(optimizer), **plain}
    if scheduling.scheduler is not None:
        parts["scheduler"] = {"_target_": full_name(scheduling.scheduler), "interval": scheduling.interval}
    parts["metrics"] = {
        key: {"_target_": full_name(getattr(metric, "function", metric))} for key, metric in metrics.items()
    }
    return yaml.safe_dump(parts, sort_keys=False)


def full_name(value: object) -> str:
    """The importable name of its class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
