"""A sweep: several runs of one job with different values, in the folders 0, 1, 2 ... of one folder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.errors import UserError
from dtrain.files import read_json, write_json
from dtrain.redact import hide_in_command
from dtrain.run.folder import RunDir, warn_of_damage
from dtrain.yaml12 import split

_NAME = "sweep.json"

Point = tuple[str, ...]  # overrides, such as optimizer.lr=0.1


@dataclass(frozen=True)
class Sweep:
    """The folder, and what is swept: the values in which each run differs."""

    folder: Path
    points: tuple[Point, ...]

    @classmethod
    def read(cls, folder: Path) -> Sweep | None:
        """The sweep in that folder; None where there is none."""
        found = read_json(folder / _NAME)
        if found is None:
            return None
        points = found.get("points")
        if not (isinstance(points, list) and all(isinstance(point, list) for point in points)):
            warn_of_damage(folder / _NAME)
            return None
        return cls(folder, tuple(map(tuple, points)))

    @classmethod
    def is_at(cls, folder: Path) -> bool:
        return (folder / _NAME).exists()

    @classmethod
    def of(cls, run: RunDir) -> Sweep | None:
        """The sweep that a run belongs to."""
        path = run.path.absolute()
        sweep = cls.read(path.parent)
        return sweep if sweep is not None and path.name in map(str, range(len(sweep.points))) else None

    @property
    def file(self) -> Path:
        return self.folder / _NAME

    def write(self) -> None:
        write_json(self.file, {"points": self.points})

    @property
    def runs(self) -> list[RunDir]:
        return [RunDir(self.folder / str(index)) for index in range(len(self.points))]

    def point(self, run: RunDir) -> str:
        """This run's own values, in words."""
        return " ".join(hide_in_command(self.points[int(run.path.absolute().name)]))


def grid(overrides: Sequence[str]) -> tuple[list[str], list[Point]]:
    """The overrides that all runs share, and each run's own: every combination of the keys' values.

    `lr=0.1,0.01` are two values, `betas=[0.9,0.99],[0.8,0.99]` too; the last key varies fastest.

    Raises:
        UserError: that is no list of values, or a key is there twice.
    """
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key} is given twice; give all its values at once: {key}=a,b")
    choices = [_choices(override) for override in overrides]
    common = [each[0] for each in choices if len(each) == 1]
    swept = [each for each in choices if len(each) > 1]
    return common, list(itertools.product(*swept))


def _choices(override: str) -> list[str]:
    """`key=a,b` as `key=a` and `key=b`."""
    key, equals, text = override.partition("=")
    values = split(text)
    if values is None:
        raise UserError(f"{override}: cannot be read as comma-separated values; quote a value that contains commas")
    return [f"{key}{equals}{value}" for value in values] or [override]
