"""What a command asks of ranks: each runs the request's entrypoint, with the request as its argument."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import ClassVar, TypeVar

_Own = TypeVar("_Own", bound="RankRequest")


@dataclass(frozen=True)
class RankRequest:
    """Something for the job of a run to do.

    Attributes:
        entrypoint: the module that does it, run as `python -m` does, one process for each rank.
        code: the folder that holds the job's own modules, absolute.
    """

    entrypoint: ClassVar[str]

    code: str

    @property
    def arguments(self) -> tuple[str, ...]:
        """The entrypoint's command line."""
        return (json.dumps(asdict(self)),)

    @classmethod
    def read(cls: type[_Own]) -> _Own:
        """The request that this process was started with."""
        return cls(**json.loads(sys.argv[1]))


@dataclass(frozen=True)
class Train(RankRequest):
    """Train to the end, from the last checkpoint if there is one. Exits 75 at a stop.

    Attributes:
        profile: the steps to be profiled, as in `Profiling.of`; None: none.
    """

    entrypoint = "dtrain.trainer.entrypoints.train"

    profile: str | None = None


@dataclass(frozen=True)
class Rehearse(RankRequest):
    """Train on the first batches. Answers with a JSON list: the types of what each rank has of its own.

    Attributes:
        stop_after: steps of a process after which it stops, as on a signal; 0: never.
    """

    entrypoint = "dtrain.trainer.entrypoints.rehearsal"

    stop_after: int = 0


@dataclass(frozen=True)
class Evaluate(RankRequest):
    """Answer with a trained model's loss and metrics, a JSON object; or write its predictions.

    Attributes:
        weights: the file of them.
        data: "train", "val", "test", or "val.NAME" for one of several; or a file of features to predict from.
        out: the file that the predictions go to, .npy or .csv, in a folder that holds nothing else; None: evaluate.
    """

    entrypoint = "dtrain.trainer.entrypoints.evaluate"

    weights: str
    data: str = "val"
    out: str | None = None


@dataclass(frozen=True)
class Export(RankRequest):
    """Write a trained model for others. Answers with how ONNX compares.

    Attributes:
        weights: the file of them.
        format: "onnx", "safetensors" or "pt".
        out: the file to write, in a folder that holds nothing else.
    """

    entrypoint = "dtrain.trainer.entrypoints.export"

    weights: str
    format: str
    out: str


@dataclass(frozen=True)
class Summarize(RankRequest):
    """Answer with the table of the model's layers."""

    entrypoint = "dtrain.trainer.entrypoints.summarize"
