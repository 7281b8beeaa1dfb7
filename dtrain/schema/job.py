"""job.yaml as a whole. What is accepted here is what `dtrain schema` prints and the docs promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from dtrain.errors import Problem
from dtrain.run.folder import RunDir
from dtrain.schema.metrics.sets import default_monitor, phase_of
from dtrain.schema.sections import Checkpoint, Data, EarlyStopping, Fit, Fsdp, InitFrom, Launch, Mlflow, Slurm
from dtrain.schema.targets import (
    MetricName,
    MetricTarget,
    Name,
    OptimizerTarget,
    OptimizerTargets,
    SchedulerTarget,
    SchedulerTargets,
    Section,
    Seed,
    Target,
    by_place,
)


def _read_script(value: object) -> list[str]:
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str | int | float) for word in words) or words in ([""], ["-m"]):
        raise ValueError("expected a script such as train.py, or a list: the script (or -m, module) and its arguments")
    return [str(word).lower() if isinstance(word, bool) else str(word) for word in words]


_WORDS = {"type": "array", "items": {"type": ["string", "number", "boolean"]}, "minItems": 1}
Script = Annotated[
    list[str], BeforeValidator(_read_script), WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, _WORDS]})
]
_OF_A_FIELD = ("default", "description", "title")
_REFERENCE = {"type": "string", "pattern": r"\$\{.+\}", "description": "The value of another field: ${fit.epochs}."}
# A path is read before; see loading.py.
_DEEPSPEED = WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": True}, {"type": "string"}]})


class Job(Section):
    """One training job, as job.yaml describes it."""

    name: Name = Field(description="Names the run folder and the Slurm job.")
    seed: Seed = Field(default=0, description="Seeds all randomness of the run.")
    model: Target = Field(description="The torch.nn.Module.")
    init_from: InitFrom | None = Field(default=None, description="Weights that training begins with.")
    data: Data = Field(description="Datasets and batches.")
    loss: Target | None = Field(default=None, description="Called as loss(predictions, target).")
    step: Target | None = Field(
        default=None, description="Instead of loss: function(model, batch) -> {loss, predictions, ...}."
    )
    optimizer: OptimizerTargets = Field(
        description="Called with the model's parameters as its first argument; or several by their names."
    )
    scheduler: SchedulerTargets | None = Field(
        default=None,
        description="Called with the optimizer as its first argument; with several optimizers, with each, or one for "
        "each by their names.",
    )
    metrics: dict[MetricName, MetricTarget] = Field(
        default_factory=dict, description="Each is reported as train_NAME and val_NAME."
    )
    callbacks: list[Target] = Field(
        default_factory=list, description="Objects that are called at moments of the training: on_epoch_end and others."
    )
    fit: Fit = Field(description="How training runs.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="When checkpoints are saved.")
    mlflow: Mlflow = Field(default_factory=Mlflow, description="Where MLflow records the run.")
    launch: Launch = Field(default_factory=Launch, description="Device and hang timeout.")
    slurm: Slurm = Field(default_factory=Slurm, description="How Slurm runs the job.")
    fsdp: Fsdp = Field(default_factory=Fsdp, description="Settings for fit.strategy: fsdp.")
    deepspeed: Annotated[dict[str, Any], _DEEPSPEED] = Field(
        default_factory=dict, description="DeepSpeed's own configuration, or the path of its JSON file."
    )

    def is_default(self, section: str) -> bool:
        """Whether that section says nothing."""
        found: bool = getattr(self, section) == type(self).model_fields[section].get_default(call_default_factory=True)
        return found

    @property
    def stopping(self) -> EarlyStopping:
        """The section, also where the job has none."""
        return self.fit.early_stopping or EarlyStopping()

    @property
    def monitor(self) -> str:
        """The reported value that decides which weights are best."""
        return self.stopping.monitor or default_monitor(self.val_phases)

    @property
    def val_phases(self) -> list[str]:
        """What begins the names of a validation's values: val, or val_NAME for each of several sets."""
        return [phase_of(place) for place in self.data.places("val")]

    @property
    def phases(self) -> list[str]:
        """What begins the names of all that is reported while it trains."""
        averages = [phase.replace("val", "ema", 1) for phase in self.val_phases if self.fit.ema]
        return ["train", *self.val_phases, *averages]

    @property
    def reported(self) -> dict[str, dict[str, float] | None]:
        """The values that an epoch may report, which a monitor may name: see `monitor_problem`."""
        found: dict[str, dict[str, float] | None] = {f"{phase}_loss": {f"{phase}_loss": 0.0} for phase in self.phases}
        for name, metric in self.metrics.items():
            phases = [phase for phase in self.phases if phase != "train" or metric.train is not False]
            found |= dict.fromkeys(f"{phase}_{name}" for phase in phases)
        return found

    @property
    def optimizers(self) -> Mapping[str, OptimizerTarget]:
        """The optimizers by their places: optimizer, or optimizer.NAME for each of several."""
        return by_place("optimizer", self.optimizer)

    @property
    def schedulers(self) -> Mapping[str, SchedulerTarget]:
        """The schedulers by their places: scheduler, which is for all optimizers, or scheduler.NAME for one."""
        return {} if self.scheduler is None else by_place("scheduler", self.scheduler)

    @property
    def monitors(self) -> dict[str, str]:
        """The keys that name a monitored value, with that name."""
        own = {"fit.early_stopping.monitor": self.monitor}
        return own | {f"{place}.monitor": each.monitor for place, each in self.schedulers.items() if each.monitor}


class ScriptJob(Section):
    """A job that runs the user's own script, as torchrun would."""

    name: Name = Field(description="Names the run folder and the Slurm job.")
    script: Script = Field(description="Instead of a model: a script, or -m and a module, with its arguments.")
    restarts: int = Field(default=0, ge=0, description="Maximum number of automatic restarts after a failure.")
    mlflow: Mlflow = Field(default_factory=Mlflow, description="Where MLflow records the run.")
    launch: Launch = Field(default_factory=Launch, description="Device and hang timeout.")
    slurm: Slurm = Field(default_factory=Slurm, description="How Slurm runs the job.")

    @property
    def is_module(self) -> bool:
        """Whether `program` is a module's name rather than a script's path."""
        return self.script[0] == "-m"

    @property
    def program(self) -> str:
        """The script, relative to the job file's folder, or the module."""
        return self.script[1 if self.is_module else 0]

    @property
    def arguments(self) -> list[str]:
        """The program's own arguments."""
        return self.script[2 if self.is_module else 1 :]


@dataclass(frozen=True)
class Loaded:
    """A job file, and where each of its values was written.

    Attributes:
        document: what is written, with overrides, before references are resolved.
    """

    path: Path
    places: Mapping[str, tuple[str, int | None]]
    document: Mapping[Any, Any]

    @property
    def folder(self) -> Path:
        """Where the job's own modules are: beside its file, or in code/ where that is a run's own job.yaml."""
        folder = self.path.absolute().parent
        run = RunDir(folder)
        is_runs = self.path.name == run.job.name and run.lock_file.exists() and run.code.is_dir()
        return run.code if is_runs else folder

    def locate(self, dotted: str) -> tuple[str, int | None]:
        """File and line of a dotted key, or its override and None; of its section where it is not written."""
        while dotted and dotted not in self.places:
            dotted = dotted.rpartition(".")[0]
        return self.places.get(dotted, (str(self.path), 1))

    def at(self, problem: Problem) -> Problem:
        """The problem with the place of its path."""
        file, line = self.locate(problem.path or "")
        return Problem(problem.message, problem.path, file, line, problem.hint)


@dataclass(frozen=True)
class LoadedJob(Loaded):
    """A job with a model."""

    job: Job


@dataclass(frozen=True)
class LoadedScript(Loaded):
    """A job with a script."""

    job: ScriptJob


def job_json_schema() -> dict[str, Any]:
    """JSON Schema of job.yaml, for editors."""
    job, script = map(_with_references, (Job.model_json_schema(), ScriptJob.model_json_schema()))
    without_effect = dict.fromkeys(sorted(job["properties"].keys() - script["properties"].keys()), False)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **job,
        "properties": {**job["properties"], "script": script["properties"]["script"]},
        "required": ["name"],
        "if": {"required": ["script"]},
        "then": {"properties": without_effect},
        "else": {"required": job["required"]},
    }


def _with_references(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a job, whose values may refer to others."""
    for section in (schema, *schema["$defs"].values()):
        for name, field in section["properties"].items():
            about = {key: value for key, value in field.items() if key in _OF_A_FIELD}
            value = {key: value for key, value in field.items() if key not in _OF_A_FIELD}
            if about:  # else a whole section
                section["properties"][name] = {"anyOf": [value, _REFERENCE], **about}
    return schema
