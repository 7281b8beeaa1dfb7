"""What the sections of job.yaml are made of: names, and the targets that are imported and built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from dtrain.schema.metrics.sets import name_problem


def _check_metric_name(name: str) -> str:
    if name == "loss":
        raise ValueError("train_loss and val_loss are the losses; give this metric another name")
    return name


# Names end up in paths, in Slurm's job names and as keys in MLflow: no separators, no leading dot or dash.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)]
MetricName = Annotated[Name, AfterValidator(_check_metric_name)]
OPTIMIZER_NAME = r"^[A-Za-z][A-Za-z0-9_]{0,99}$"  # which values are called after
OptimizerName = Annotated[str, Field(pattern=OPTIMIZER_NAME)]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Lines = Annotated[list[str], BeforeValidator(lambda value: value.splitlines() if isinstance(value, str) else value)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """A part of job.yaml: fixed keys, fixed types (no string for a number, no bool for an int), frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _describe_hydras_keys(schema: dict[str, Any]) -> None:
    schema["properties"] |= {
        "_args_": {"type": "array", "description": "Positional arguments, after those that dtrain passes."},
        "_partial_": {
            "type": "boolean",
            "description": "Do not call it: pass the function, with these arguments bound (functools.partial).",
        },
    }


class Target(Section):
    """A callable by its importable name, with its arguments as further keys; arguments may be targets themselves."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_describe_hydras_keys)

    target: str = Field(alias="_target_", min_length=1, description="Importable name, such as net.DigitNet.")

    @property
    def arguments(self) -> dict[str, Any]:
        """What is passed to the target by name."""
        return dict(self.model_extra or {})


class MetricTarget(Target):
    """A torchmetrics metric; `activation` and `train` are dtrain's, all other keys are its arguments."""

    activation: Literal["softmax", "sigmoid", "none"] | None = Field(
        default=None, description="Applied to the predictions before the metric sees them."
    )
    train: bool | None = Field(
        default=None,
        description="Compute it on training predictions too; default: yes, unless the metric stores all samples.",
    )


class SchedulerTarget(Target):
    """A learning-rate scheduler; `interval` and `monitor` are dtrain's, all other keys are its arguments."""

    interval: Literal["epoch", "step"] = Field(
        default="epoch", description="When the scheduler steps: after each epoch, or after each optimizer step."
    )
    monitor: str | None = Field(
        default=None,
        description="The value passed to ReduceLROnPlateau and its like; default: the one that selects the best "
        "weights.",
    )


class Group(Section):
    """A parameter group with its own optimizer settings; two keys are dtrain's, all others the optimizer's."""

    model_config = ConfigDict(extra="allow")

    params: Names = Field(
        min_length=1,
        description="Patterns that match parameter names ('*.bias') or module classes ('LayerNorm.*').",
    )
    lr_factor: float | None = Field(
        default=None, gt=0, description="The group's learning rate, as a multiple of the optimizer's lr."
    )


class OptimizerTarget(Target):
    """An optimizer; `groups` is dtrain's, all other keys are its arguments."""

    groups: list[Group] = Field(default_factory=list, description="Parameter groups with their own settings.")


class NamedOptimizer(OptimizerTarget):
    """One of several optimizers; `params` and `groups` are dtrain's, all other keys are its arguments."""

    params: Names = Field(
        default_factory=list,
        description="Patterns that match the names of the parameters that it trains ('generator.*') or module classes; "
        "without any: those that no other optimizer has.",
    )


def _check_set_names(sets: dict[str, Target]) -> dict[str, Target]:
    if problem := name_problem(sets):
        raise ValueError(problem)
    return sets


def _one_or_several(value: object) -> str:
    if not isinstance(value, dict) or "_target_" in value:
        return "[one]"
    return "[several]" if any(isinstance(each, dict | Target) for each in value.values()) else "[one]"


# A dataset, or several by their names.
Datasets = Annotated[
    Annotated[Target, Tag("[one]")] | Annotated[dict[str, Target], AfterValidator(_check_set_names), Tag("[several]")],
    Discriminator(_one_or_several),
]


T = TypeVar("T", bound=Target)


def by_place(key: str, given: T | Mapping[str, T]) -> dict[str, T]:
    """What a key holds, by its place in the job: KEY, or KEY.NAME for each of several."""
    return {key: given} if isinstance(given, Target) else {f"{key}.{name}": each for name, each in given.items()}


# An optimizer, or several by their names; and what changes its learning rates, or theirs.
OptimizerTargets = Annotated[
    Annotated[OptimizerTarget, Tag("[one]")] | Annotated[dict[OptimizerName, NamedOptimizer], Tag("[several]")],
    Discriminator(_one_or_several),
]
SchedulerTargets = Annotated[
    Annotated[SchedulerTarget, Tag("[one]")] | Annotated[dict[OptimizerName, SchedulerTarget], Tag("[several]")],
    Discriminator(_one_or_several),
]
