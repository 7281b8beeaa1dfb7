"""The strategies by their names: what is known of each before its module is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dtrain.errors import Problem
from dtrain.schema import deepspeed_config
from dtrain.schema.sections import Fsdp
from dtrain.schema.targets import OptimizerTarget

if TYPE_CHECKING:
    from dtrain.schema.job import Job


@dataclass(frozen=True)
class Strategy:
    """How ranks share a model.

    Attributes:
        module: it has a function `parallel(net, world, settings, fit, dtype)`, which makes a Parallel.
        settings: the type of the settings that Trainer takes in place of the name, and job.yaml in a section of that
            name; None: there are none.
        package: what it needs beside torch.
        is_plain: each rank has the whole model, and torch's own optimizer and backward pass.
        from_meta: ranks above 0 need no values in the model that they are given.
        disagreements: what is wrong with its section, or between it and the rest of a job.
    """

    module: str
    settings: type[Any] | None = None
    package: str | None = None
    is_plain: bool = False
    from_meta: bool = False
    disagreements: Callable[[Job], Iterable[Problem]] = lambda job: ()


def _of_deepspeed(job: Job) -> Iterable[Problem]:
    if not isinstance(job.optimizer, OptimizerTarget):  # which is refused
        return ()
    optimizer = {"_target_": job.optimizer.target, **job.optimizer.arguments}
    return deepspeed_config.disagreements(job.deepspeed, job.fit, batch_size=job.data.batch_size, optimizer=optimizer)


STRATEGIES = {
    "ddp": Strategy("dtrain.trainer.strategies.ddp", is_plain=True),
    "fsdp": Strategy("dtrain.trainer.strategies.fsdp", Fsdp, from_meta=True),
    "deepspeed": Strategy(
        "dtrain.trainer.strategies.deepspeed", Mapping, package="deepspeed", disagreements=_of_deepspeed
    ),
}


def name_of(settings: object) -> str | None:
    """The strategy that these settings are of."""
    kinds = ((name, strategy.settings) for name, strategy in STRATEGIES.items())
    return next((name for name, kind in kinds if kind is not None and isinstance(settings, kind)), None)
