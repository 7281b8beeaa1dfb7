"""The schema of job.yaml. What is accepted here is what `dtrain schema` prints and the docs promise."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    WithJsonSchema,
)

from dtrain.errors import Problem
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import HANG_TIMEOUT_S
from dtrain.schema import deepspeed_config, sbatch
from dtrain.schema.monitor import monitor_problem


def _check_metric_name(name: str) -> str:
    if name == "loss":
        raise ValueError("train_loss and val_loss are the losses; give this metric another name")
    return name


def _check_every(value: object) -> object:
    # Ahead of the union, whose own errors come one for each member.
    if value == "epoch" or (type(value) is int and value > 0):
        return value
    raise ValueError("expected epoch or a number of optimizer steps above 0")


def _read_script(value: object) -> list[str]:
    words = value if isinstance(value, list) else [value]
    if not words or not all(isinstance(word, str | int | float) for word in words) or words in ([""], ["-m"]):
        raise ValueError("expected a script such as train.py, or a list: it, or -m and a module, and the arguments")
    return [str(word).lower() if isinstance(word, bool) else str(word) for word in words]


# Names end up in paths, in Slurm's job names and as keys in MLflow: no separators, no leading dot or dash.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)]
MetricName = Annotated[Name, AfterValidator(_check_metric_name)]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Lines = Annotated[list[str], BeforeValidator(lambda value: value.splitlines() if isinstance(value, str) else value)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Every = Annotated[Literal["epoch"] | PositiveInt, BeforeValidator(_check_every)]
_WORDS = {"type": "array", "items": {"type": ["string", "number", "boolean"]}, "minItems": 1}
Script = Annotated[
    list[str], BeforeValidator(_read_script), WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, _WORDS]})
]
# A path is read before; see loading.py.
_DEEPSPEED = WithJsonSchema({"anyOf": [{"type": "object", "additionalProperties": True}, {"type": "string"}]})


class Section(BaseModel):
    """A part of job.yaml: fixed keys, fixed types (no string for a number, no bool for an int), frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Target(Section):
    """A callable by its importable name, with its arguments beside it; they may be targets themselves."""

    model_config = ConfigDict(extra="allow")

    target: str = Field(alias="_target_", min_length=1, description="Importable name, such as net.DigitNet.")

    @property
    def arguments(self) -> dict[str, Any]:
        """What is passed to the target by name."""
        return dict(self.model_extra or {})


class MetricTarget(Target):
    """A torchmetrics metric; `activation` and `train` are ours, the rest are its arguments."""

    activation: Literal["softmax", "sigmoid", "none"] | None = Field(
        default=None, description="Applied to the predictions before the metric sees them."
    )
    train: bool | None = Field(
        default=None,
        description="Also on training predictions; by default unless the metric keeps all samples.",
    )


class SchedulerTarget(Target):
    """A learning-rate scheduler; `interval` and `monitor` are ours, the rest are its arguments."""

    interval: Literal["epoch", "step"] = Field(default="epoch", description="Steps each epoch or each optimizer step.")
    monitor: str | None = Field(
        default=None,
        description="What one such as ReduceLROnPlateau looks at; by default what decides which weights are best.",
    )


class Group(Section):
    """Parameters of the optimizer with settings of their own; `params` is ours, the rest are the optimizer's."""

    model_config = ConfigDict(extra="allow")

    params: Names = Field(
        min_length=1, description="Patterns of names, such as '*.bias', or of classes, such as 'LayerNorm.*'."
    )


class OptimizerTarget(Target):
    """An optimizer; `groups` is ours, the rest are its arguments."""

    groups: list[Group] = Field(default_factory=list, description="Parameters with settings of their own.")


class Data(Section):
    """What is trained on, and in what batches."""

    train: Target = Field(description="The training dataset.")
    val: Target | None = Field(default=None, description="The validation dataset.")
    batch_size: PositiveInt = Field(description="Samples per optimizer step, over all ranks.")
    workers: int = Field(default=0, ge=0, description="Loading processes per rank.")
    shuffle: bool = Field(default=True, description="Reshuffle the training samples each epoch.")
    sampler: Target | None = Field(
        default=None, description="Gets the training dataset as its first argument; its order replaces `shuffle`."
    )
    collate: Target | None = Field(default=None, description="Function that makes a batch of samples.")


class EarlyStopping(Section):
    """What decides which weights are best, and when to stop."""

    monitor: str | None = Field(
        default=None, description="A reported value, such as val_acc; by default val_loss, else train_loss."
    )
    mode: Literal["min", "max"] = Field(default="min", description="Whether a lower or a higher value is better.")
    patience: PositiveInt | None = Field(
        default=None, description="Epochs without a better value before the run stops; null: never."
    )


class Fit(Section):
    """How training runs."""

    epochs: PositiveInt = Field(description="Passes over the training dataset.")
    strategy: Literal["ddp", "fsdp", "deepspeed"] = Field(
        default="ddp", description="How ranks share the work: ddp, or fsdp and deepspeed for models that outgrow a GPU."
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="Largest number of samples in one forward pass of a rank; null: no limit."
    )
    early_stopping: EarlyStopping | None = Field(default=None, description="Best weights and early stop.")
    deterministic: bool = Field(default=False, description="Bit-identical repetition on CUDA, slower.")
    restarts: int = Field(
        default=0, ge=0, description="How often a failed run is started again, from its last checkpoint."
    )
    sync_batchnorm: bool = Field(default=False, description="Batch norm over all ranks, on CUDA.")
    find_unused_parameters: bool = Field(
        default=False, description="ddp: batches may leave out some of the model's parameters, each batch others."
    )
    activation_checkpointing: Names = Field(
        default_factory=list,
        description="Classes of modules that compute their activations again in the backward pass, to save memory.",
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        default="fp32", description="Compute precision; bf16 and fp16 use autocast."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Largest norm of the gradients, over all parameters."
    )
    clip_value: float | None = Field(default=None, gt=0, description="Clip each gradient element to [-x, x].")
    l1: float | None = Field(default=None, gt=0, description="Adds l1 sum |w| to the loss, over weights; no biases.")
    l2: float | None = Field(default=None, gt=0, description="Adds l2/2 sum w^2 to the loss, over weights; no biases.")
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="Decay of a moving average of the weights, evaluated and saved beside."
    )
    on_nonfinite: Literal["stop", "skip"] | None = Field(
        default=None, description="Gradients with inf or nan end the run, or their batch is left out; null: neither."
    )


class Checkpoint(Section):
    """When the state that a run continues from is saved."""

    every: Every = Field(default="epoch", description="epoch, or a number of optimizer steps.")
    keep: int = Field(default=2, ge=1, description="Checkpoints kept, the newest ones.")


class Mlflow(Section):
    """Where MLflow records the run."""

    experiment: str | None = Field(default=None, description="Experiment; by default the job's name.")
    tracking_uri: str | None = Field(default=None, description="Server or store; by default MLflow's own.")
    run_name: str | None = Field(default=None, description="Run; by default the run folder's name.")


class Launch(Section):
    """What the processes run on."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA where present.")
    hang_timeout_s: float = Field(
        default=HANG_TIMEOUT_S, gt=0, description="Seconds without progress before the job is aborted."
    )


class Fsdp(Section):
    """How FSDP2 cuts the model."""

    wrap: Names = Field(
        default_factory=list,
        description="Classes of modules that are gathered one at a time; by default the repeated blocks.",
    )
    reshard_after_forward: bool = Field(
        default=True, description="Drop a block after its forward pass, and gather it again for the backward pass."
    )
    offload: bool = Field(
        default=False, description="Keep parameters, gradients and the optimizer's state in the CPU's memory."
    )


class Slurm(Section):
    """How Slurm runs the job: sbatch's long options by their own names, and five of ours."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "propertyNames": {
                "enum": [*sorted(sbatch.OPTIONS), "setup", "env", "container", "dtrain", "requeue_on_failure"]
            }
        },
    )

    setup: Lines = Field(
        default_factory=list, description="Shell lines before the run: modules, conda, a virtual environment."
    )
    env: dict[EnvironmentName, str] = Field(default_factory=dict, description="Environment variables.")
    container: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Apptainer image to run in."
    )
    dtrain: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The dtrain command on the nodes, if it differs from here."
    )
    requeue_on_failure: bool = Field(default=False, description="Requeue after a failure as well.")

    @property
    def options(self) -> dict[str, Any]:
        """What is sbatch's."""
        return {name: value for name, value in self.extra.items() if name not in sbatch.PYXIS}

    @property
    def pyxis(self) -> dict[str, Any]:
        """What srun is told of a container, by the plugin Pyxis."""
        return {name: value for name, value in self.extra.items() if name in sbatch.PYXIS}

    @property
    def extra(self) -> dict[str, Any]:
        """What is not ours."""
        return dict(self.model_extra or {})

    @property
    def is_in_container(self) -> bool:
        return self.container is not None or bool(self.pyxis)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Each text of ours by its path."""
        yield from ((f"setup.{index}", line) for index, line in enumerate(self.setup))
        yield from ((f"env.{name}", value) for name, value in self.env.items())
        for name in ("container", "dtrain"):
            if (text := getattr(self, name)) is not None:
                yield name, text


class Job(Section):
    """One training job, as job.yaml describes it."""

    name: Name = Field(description="Names the run folder and the Slurm job.")
    seed: Seed = Field(default=0, description="Seeds all randomness of the run.")
    model: Target = Field(description="The torch.nn.Module.")
    data: Data = Field(description="Datasets and batches.")
    loss: Target | None = Field(default=None, description="Called as loss(predictions, target).")
    step: Target | None = Field(
        default=None, description="Instead of loss: function(model, batch) -> {loss, predictions, ...}."
    )
    optimizer: OptimizerTarget = Field(description="Gets the parameters as its first argument.")
    scheduler: SchedulerTarget | None = Field(default=None, description="Gets the optimizer as its first argument.")
    metrics: dict[MetricName, MetricTarget] = Field(
        default_factory=dict, description="Each is reported as train_NAME and val_NAME."
    )
    fit: Fit = Field(description="How training runs.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="When state is saved.")
    mlflow: Mlflow = Field(default_factory=Mlflow, description="Where MLflow records the run.")
    launch: Launch = Field(default_factory=Launch, description="What the processes run on.")
    slurm: Slurm = Field(default_factory=Slurm, description="How Slurm runs it.")
    fsdp: Fsdp = Field(default_factory=Fsdp, description="Settings of strategy fsdp.")
    deepspeed: Annotated[dict[str, Any], _DEEPSPEED] = Field(
        default_factory=dict, description="DeepSpeed's own settings, or the path of its JSON file."
    )

    @property
    def monitor(self) -> str:
        """The reported value that decides which weights are best."""
        stopping = self.fit.early_stopping
        return (stopping and stopping.monitor) or ("val_loss" if self.data.val else "train_loss")

    @property
    def monitor_mode(self) -> Literal["min", "max"]:
        """Whether less or more of `monitor` is better."""
        return self.fit.early_stopping.mode if self.fit.early_stopping else "min"

    @property
    def reported(self) -> dict[str, dict[str, float] | None]:
        """What may be reported each epoch, and named by a monitor: see `monitor_problem`."""
        train = [f"train_{name}" for name, metric in self.metrics.items() if metric.train is not False]
        phases = ["val"] * bool(self.data.val) + ["ema"] * bool(self.data.val and self.fit.ema)
        names = ["train_loss", *train, *(f"{phase}_{name}" for phase in phases for name in ["loss", *self.metrics])]
        return {name: {name: 0.0} if name.partition("_")[2] == "loss" else None for name in names}

    @property
    def monitors(self) -> dict[str, str]:
        """The keys that say what is monitored, with its name."""
        own = {"fit.early_stopping.monitor": self.monitor}
        scheduler = self.scheduler and self.scheduler.monitor
        return own | ({"scheduler.monitor": scheduler} if scheduler else {})


class ScriptJob(Section):
    """A job that runs a script of the user's own, as torchrun would: what the script does is its own affair."""

    name: Name = Field(description="Names the run folder and the Slurm job.")
    script: Script = Field(description="In place of a model: a script, or -m and a module, with its arguments.")
    restarts: int = Field(default=0, ge=0, description="How often the processes are started again after a failure.")
    mlflow: Mlflow = Field(default_factory=Mlflow, description="Where MLflow records the run.")
    launch: Launch = Field(default_factory=Launch, description="What the processes run on.")
    slurm: Slurm = Field(default_factory=Slurm, description="How Slurm runs it.")

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
        """The program's own."""
        return self.script[2 if self.is_module else 1 :]


@dataclass(frozen=True)
class Loaded:
    """A job file, and where each of its values was written."""

    path: Path
    places: Mapping[str, tuple[str, int | None]]

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


def contradictions_of(fit: Fit) -> list[Problem]:
    """What is wrong between settings of this section that are each right."""
    problems = []
    if fit.clip_norm and fit.clip_value:
        problems.append(Problem("clips the gradients once more; give either clip_norm or clip_value", "fit.clip_value"))
    if fit.find_unused_parameters and fit.strategy != "ddp":
        problems.append(Problem("goes with ddp alone", "fit.find_unused_parameters"))
    if fit.precision == "fp16" and fit.on_nonfinite == "stop":
        message = "fp16 finds its scale by steps that overflow and are left out; use skip, or bf16"
        problems.append(Problem(message, "fit.on_nonfinite"))
    return problems


def contradictions(job: Job) -> list[Problem]:
    """What is wrong between fields that are each right."""
    problems = []
    if job.loss and job.step:
        problems.append(Problem("makes its own loss; give either loss or step", "step"))
    if not job.loss and not job.step:
        problems.append(Problem("missing; give loss or step", "loss"))
    problems += contradictions_of(job.fit)
    if job.fit.strategy == "deepspeed":
        optimizer = {"_target_": job.optimizer.target, **job.optimizer.arguments}
        problems += deepspeed_config.disagreements(
            job.deepspeed, job.fit, batch_size=job.data.batch_size, optimizer=optimizer
        )
    for section, is_given in (("fsdp", job.fsdp != Fsdp()), ("deepspeed", bool(job.deepspeed))):
        if is_given and job.fit.strategy != section:
            problems.append(Problem("settings of a strategy that fit.strategy does not choose", section))
    if job.scheduler and re.fullmatch(r"torch\.optim\.[A-Z]\w*", job.scheduler.target):
        message = "an optimizer is no scheduler; torch's are in torch.optim.lr_scheduler"
        problems.append(Problem(message, "scheduler._target_"))
    problems += [each for path, name in job.monitors.items() for each in _wrong_monitor(job, name, path)]
    problems += _wrong_plateau(job)
    settings = [("optimizer", job.optimizer.arguments)]
    settings += [(f"optimizer.groups.{i}", group.model_extra or {}) for i, group in enumerate(job.optimizer.groups)]
    for path, given in settings:
        if "lr" in given and not _is_rate(given["lr"], job.optimizer.target):
            problems.append(Problem(f"expected a positive number, found {given['lr']!r}", f"{path}.lr"))
    return problems + wrong_slurm_options(job)


def _wrong_monitor(job: Job, monitor: str, path: str) -> list[Problem]:
    if not (problem := monitor_problem(monitor, job.reported)):
        return []
    if monitor.startswith("val_") and not job.data.val:
        problem = f"nothing is reported as {monitor}; without data.val there is no validation"
    return [Problem(problem, path)]


def _wrong_plateau(job: Job) -> list[Problem]:
    """A scheduler that would take a better value for a worse one."""
    if job.scheduler is None or job.scheduler.target.rpartition(".")[2] != "ReduceLROnPlateau":
        return []
    mode, watched = job.scheduler.arguments.get("mode", "min"), job.scheduler.monitor or job.monitor
    known = job.monitor_mode if watched == job.monitor else "min" if watched.endswith("_loss") else mode
    if mode == known or mode not in ("min", "max"):
        return []
    better = "less" if known == "min" else "more"
    message = f"its mode is {mode}, and it looks at {watched}, of which {better} is better"
    return [Problem(message, "scheduler", hint=f"mode: {known}, or another value as scheduler.monitor")]


def _is_rate(value: object, optimizer: str) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0 <= value < math.inf
    # A tensor may be made by a target; and optimizers that find their own rate take null for it.
    return isinstance(value, dict) or (value is None and not optimizer.startswith("torch."))


def wrong_slurm_options(job: Job | ScriptJob) -> list[Problem]:
    """What sbatch would not take, or dtrain sets itself."""
    found = ((name, sbatch.problem(name, value, Slurm.model_fields)) for name, value in job.slurm.extra.items())
    problems = [Problem(message, f"slurm.{name}") for name, message in found if message]
    problems += [Problem("holds a NUL character", f"slurm.{path}") for path, text in job.slurm.texts() if "\0" in text]
    return problems


def job_json_schema() -> dict[str, Any]:
    """JSON Schema of job.yaml, for editors."""
    job, script = Job.model_json_schema(), ScriptJob.model_json_schema()
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
