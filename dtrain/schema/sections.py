"""The sections of job.yaml. `Trainer` builds them too, so that both doors refuse the same values in the same words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from dtrain.run.heartbeat import HANG_TIMEOUT_S
from dtrain.schema import sbatch


def _check_metric_name(name: str) -> str:
    if name == "loss":
        raise ValueError("train_loss and val_loss are the losses; give this metric another name")
    return name


def _check_every(value: object) -> object:
    # Ahead of the union, whose own errors come one for each member.
    if value == "epoch" or (type(value) is int and value > 0):
        return value
    raise ValueError("expected epoch or a number of optimizer steps above 0")


# Names end up in paths, in Slurm's job names and as keys in MLflow: no separators, no leading dot or dash.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)]
MetricName = Annotated[Name, AfterValidator(_check_metric_name)]
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
Lines = Annotated[list[str], BeforeValidator(lambda value: value.splitlines() if isinstance(value, str) else value)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Every = Annotated[Literal["epoch"] | PositiveInt, BeforeValidator(_check_every)]


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
