"""The sections of job.yaml. `Trainer` builds them too, so that both reject the same values with the same messages."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import HANG_TIMEOUT_S
from dtrain.schema import sbatch
from dtrain.schema.interval import Duration, Every, StepsOrEpochs
from dtrain.schema.targets import Datasets, EnvironmentName, Lines, Names, Section, Target, by_place


class Data(Section):
    """Datasets, and how they are read and batched."""

    train: Target = Field(description="The training dataset.")
    val: Datasets | None = Field(default=None, description="The validation dataset, or several by their names.")
    test: Datasets | None = Field(
        default=None,
        description="The test dataset, or several by their names, evaluated once: when training is over, with the best "
        "weights.",
    )
    batch_size: PositiveInt = Field(description="Samples per optimizer step, over all ranks.")
    workers: int = Field(default=0, ge=0, description="Loading processes per rank.")
    shuffle: bool = Field(default=True, description="Reshuffle the training samples each epoch.")
    sampler: Target | None = Field(
        default=None, description="Called with the training dataset; its order replaces `shuffle`."
    )
    collate: Target | None = Field(default=None, description="Function that collates samples into a batch.")

    @property
    def sets(self) -> dict[str, Target]:
        """The datasets that the job has, by their places: train, and val, or val.NAME for each of several."""
        given = {"train": self.train, "val": self.val, "test": self.test}
        return {
            place: target
            for key, each in given.items()
            if each is not None
            for place, target in by_place(key, each).items()
        }

    def places(self, section: str) -> list[str]:
        """The places of the datasets in a section: of val, or of val.NAME, which is one of them."""
        return [place for place in self.sets if place == section or place.startswith(f"{section}.")]


class InitFrom(Section):
    """Weights that the model begins with, in place of those that it is built with; as a text, where they are."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"]})

    weights: str = Field(
        min_length=1,
        description="A file of weights, a run folder (its best ones), or a folder that save_pretrained has made.",
    )
    skip: Names = Field(
        default_factory=list,
        description="Patterns of what is not loaded: names of tensors ('head.*') or module classes ('BatchNorm2d.*').",
    )
    rename: dict[str, str] = Field(
        default_factory=dict, description="Names in the file, or their beginnings, with the model's names for them."
    )
    strict: bool = Field(default=True, description="Refuse names that the file or the model alone has.")

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, value: object) -> object:
        return {"weights": os.fspath(value)} if isinstance(value, str | os.PathLike) else value

    @property
    def file(self) -> Path:
        """The file that is meant, which need not exist."""
        path = Path(self.weights)
        of_transformers = path / "model.safetensors"  # as save_pretrained writes it
        return of_transformers if of_transformers.exists() else RunDir(path).best_weights if path.is_dir() else path


class Freeze(Section):
    """Parameters that are not trained, or not yet; as a text, one pattern."""

    model_config = ConfigDict(json_schema_extra={"type": ["object", "string"]})

    patterns: Names = Field(
        min_length=1,
        description="Patterns that match parameter names ('encoder.*') or module classes ('Embedding.*').",
    )
    until: StepsOrEpochs | None = Field(
        default=None,
        description="Train them after so many optimizer steps, or epochs: 500, 3 epochs; null: not in this run.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_short_form(cls, value: object) -> object:
        return {"patterns": [value]} if isinstance(value, str) else value


def _listed(value: object) -> object:
    return [value] if isinstance(value, str | Mapping | Freeze) else list(value) if isinstance(value, tuple) else value


class EarlyStopping(Section):
    """Which value selects the best weights, and when to stop early."""

    monitor: str | None = Field(
        default=None,
        description="A reported value, such as val_acc; default: val_loss if there is data.val, else train_loss. "
        "Required where there are several validation sets.",
    )
    mode: Literal["min", "max"] = Field(default="min", description="Whether a lower or a higher value is better.")
    patience: PositiveInt | None = Field(
        default=None, description="Validations without improvement before the run stops; null: never stop early."
    )
    min_delta: float = Field(
        default=0.0, ge=0, description="The least improvement that counts for `patience`; the best weights need none."
    )
    threshold: float | None = Field(default=None, description="Stop as soon as the value is as good as this.")
    stop_on_nan: bool = Field(default=False, description="Stop as soon as the value is nan or infinite.")


class Fit(Section):
    """How training runs."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["epochs"]}, {"required": ["steps"]}]})

    epochs: PositiveInt | None = Field(default=None, description="Passes over the training dataset.")
    steps: PositiveInt | None = Field(
        default=None, description="Optimizer steps of the whole run; with `epochs`, whichever ends first."
    )
    validate_every: StepsOrEpochs = Field(
        default="epoch", description="epoch, a number of optimizer steps, or text such as 5 epochs."
    )
    report_every: StepsOrEpochs = Field(
        default="epoch", description="How often the training's values are reported: as validate_every."
    )
    max_time: Duration | None = Field(
        default=None,
        description="Stop with a checkpoint and exit code 75 after training so long in one launch, such as 12 h.",
    )
    strategy: Literal["ddp", "fsdp", "deepspeed"] = Field(
        default="ddp", description="ddp: the whole model on each rank; fsdp, deepspeed: sharded, for larger models."
    )
    micro_batch_size: PositiveInt | None = Field(
        default=None, description="Maximum number of samples per forward pass and rank; null: no limit."
    )
    early_stopping: EarlyStopping | None = Field(default=None, description="Best weights and early stopping.")
    deterministic: bool = Field(
        default=False, description="Use deterministic CUDA kernels only: bit-identical reruns, but slower."
    )
    restarts: int = Field(
        default=0, ge=0, description="Maximum number of automatic restarts from the last checkpoint after a failure."
    )
    freeze: Annotated[list[Freeze], BeforeValidator(_listed)] = Field(
        default_factory=list,
        description="Parameters that are not trained, or not yet; of entries that match one the first counts.",
    )
    sync_batchnorm: bool = Field(default=False, description="Compute batch norm statistics over all ranks (CUDA only).")
    unused_parameters: Literal["refuse", "allow"] = Field(
        default="refuse", description="Batches whose loss does not depend on all parameters; allow: ddp only."
    )
    activation_checkpointing: Names = Field(
        default_factory=list,
        description="Module classes whose activations are recomputed in the backward pass to save memory.",
    )
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = Field(
        default="fp32", description="Compute precision; bf16 and fp16 use autocast."
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="Clip the gradient to this norm, taken over all parameters."
    )
    clip_value: float | None = Field(default=None, gt=0, description="Clip each gradient element to [-x, x].")
    l1: float | None = Field(
        default=None, gt=0, description="L1 penalty: adds l1 * sum |w| to the loss; biases and norms are exempt."
    )
    l2: float | None = Field(
        default=None, gt=0, description="L2 penalty: adds l2/2 * sum w^2 to the loss; biases and norms are exempt."
    )
    ema: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of an exponential moving average of the weights, which is evaluated and saved too.",
    )
    on_nonfinite: Literal["stop", "skip"] | None = Field(
        default=None,
        description="On inf or nan gradients: stop ends the run, skip skips the batch; null: no check.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_former_name(cls, value: object) -> object:
        """With unused_parameters as runs have it in their job.yaml that were made when it was a yes or no."""
        if not isinstance(value, Mapping) or not isinstance(former := value.get("find_unused_parameters"), bool):
            return value
        rest = {key: each for key, each in value.items() if key != "find_unused_parameters"}
        return {"unused_parameters": "allow" if former else "refuse", **rest}


class Checkpoint(Section):
    """When checkpoints are saved, and how many are kept."""

    every: Every = Field(
        default="epoch", description="epoch, a number of optimizer steps, or text such as 5 epochs or 30 min."
    )
    keep: int = Field(default=2, ge=1, description="How many of the newest checkpoints to keep.")
    keep_every: StepsOrEpochs | None = Field(
        default=None, description="Keep the first checkpoint of each such interval as well: as fit.validate_every."
    )


class Mlflow(Section):
    """Where MLflow records the run."""

    experiment: str | None = Field(default=None, description="Experiment name; default: the job's name.")
    tracking_uri: str | None = Field(
        default=None, description="Tracking server or store; default: MLFLOW_TRACKING_URI, or mlflow.db here."
    )
    run_name: str | None = Field(default=None, description="Run name; default: the run folder's name.")


class Launch(Section):
    """The device of the processes, and when they count as hung."""

    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: CUDA if the node has it.")
    hang_timeout_s: float = Field(
        default=HANG_TIMEOUT_S, gt=0, description="Seconds without progress before the job is aborted."
    )


class Fsdp(Section):
    """How FSDP2 shards the model."""

    wrap: Names = Field(
        default_factory=list,
        description="Module classes to shard and gather as units; default: the model's repeated blocks.",
    )
    reshard_after_forward: bool = Field(
        default=True, description="Free a unit's parameters after its forward pass; gather them again for the backward."
    )
    offload: bool = Field(default=False, description="Keep parameters, gradients and optimizer state in CPU memory.")


class Slurm(Section):
    """How Slurm runs the job: sbatch's long options by their own names, and five keys of dtrain's."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "propertyNames": {
                "enum": [*sorted(sbatch.OPTIONS), "setup", "env", "container", "dtrain", "requeue_on_failure"]
            }
        },
    )

    setup: Lines = Field(
        default_factory=list,
        description="Shell lines to run before the job: modules, conda, a virtual environment.",
    )
    env: dict[EnvironmentName, str] = Field(default_factory=dict, description="Environment variables.")
    container: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="Apptainer image to run the job in."
    )
    dtrain: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="The dtrain command on the nodes, if it differs from this machine's."
    )
    requeue_on_failure: bool = Field(default=False, description="Requeue after failures too.")

    @property
    def options(self) -> dict[str, Any]:
        """The options for sbatch."""
        return {name: value for name, value in self.extra.items() if name not in sbatch.PYXIS}

    @property
    def pyxis(self) -> dict[str, Any]:
        """The container options for srun, which the Pyxis plugin provides."""
        return {name: value for name, value in self.extra.items() if name in sbatch.PYXIS}

    @property
    def extra(self) -> dict[str, Any]:
        """All keys that are not dtrain's own."""
        return dict(self.model_extra or {})

    @property
    def is_in_container(self) -> bool:
        return self.container is not None or bool(self.pyxis)

    def texts(self) -> Iterator[tuple[str, str]]:
        """The texts in dtrain's own keys, each with its path."""
        yield from ((f"setup.{index}", line) for index, line in enumerate(self.setup))
        yield from ((f"env.{name}", value) for name, value in self.env.items())
        for name in ("container", "dtrain"):
            if (text := getattr(self, name)) is not None:
                yield name, text
