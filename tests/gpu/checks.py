"""What a check is, and what checks have in common: the job that they launch, and how numbers are compared."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from command import RANK_VARIABLES, Command, Done

from dtrain.run.folder import RunDir

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Place:
    """Where a check runs: on "cuda" or "cpu", and in a folder of its own, which is its working directory."""

    device: str
    folder: Path

    @property
    def has_gpu(self) -> bool:
        return self.device == "cuda"


Run = Callable[[Place], str]


@dataclass(frozen=True)
class Check:
    """A check, in a process of its own. What it returns is its figure; where it fails it raises.

    Args:
        limit_s: so long may it take.
        alone: whether no other check may run meanwhile: it measures time or memory, or fills the card.
    """

    number: int
    title: str
    run: Run
    limit_s: float
    alone: bool


class LeftOut(Exception):
    """The check can't be made here; the message says why."""


CHECKS: dict[int, Check] = {}


def check(number: int, title: str, *, limit_s: float = 90, alone: bool = False) -> Callable[[Run], Run]:
    """Registers the function as a check."""

    def register(run: Run) -> Run:
        CHECKS[number] = Check(number, title, run, limit_s, alone)
        return run

    return register


class Job:
    """A copy of the folder `job` beside this file, and the command that a user would type there.

    Args:
        overrides: of its job.yaml, for each launch.
    """

    def __init__(self, place: Place, name: str, *overrides: str) -> None:
        self.folder = place.folder / name
        shutil.copytree(HERE / "job", self.folder)
        self._overrides = (f"launch.device={place.device}", *overrides)
        self.run = RunDir(self.folder / "run")

    def go(self) -> None:
        """Let its model go on, where it would fail or wait."""
        (self.folder / "go").touch()

    def launch(self, *options: str) -> Command:
        return dtrain(self.folder, "launch", "--gpus", "1", "--run-dir", "run", *options, "job.yaml", *self._overrides)

    def train(self, *options: str) -> list[dict[str, Any]]:
        """Launch it; its rows at the end, which must be a good one."""
        succeed(self.launch(*options))
        return self.run.rows()

    def train_until_it_fails(self, *options: str) -> Done:
        done = self.launch(*options).wait()
        assert done.code == 1, f"exit code {done.code}:\n{done.last_lines}"
        return done


def dtrain(folder: Path, *arguments: str) -> Command:
    """The command `dtrain`, from the checkout."""
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    return Command([sys.executable, "-m", "dtrain", *arguments], folder, environment)


def succeed(command: Command) -> Done:
    """Its end, and that of all its processes."""
    done = command.wait()
    assert done.code == 0, f"exit code {done.code}:\n{done.last_lines}"
    return done


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far they are apart, relative to the greatest number."""
    expected = expected.double().cpu()
    return float((found.detach().double().cpu() - expected).abs().max() / expected.abs().max())


def apart(rows: list[dict[str, Any]], others: list[dict[str, Any]], names: tuple[str, ...] = ("train_loss",)) -> float:
    """How far two histories are apart at most, relatively, in these values."""
    assert len(rows) == len(others) > 0, f"{len(rows)} and {len(others)} epochs"
    pairs = [(row[name], other[name]) for row, other in zip(rows, others, strict=True) for name in names]
    return max(abs(one - other) / abs(other) for one, other in pairs)


def below(what: str, value: float, limit: float) -> str:
    """The figure of a value that must be below the limit."""
    assert value < limit, f"{what}: {value:.3g}, and at most {limit:.3g} is right"
    return f"{what} {value:.2g}"
