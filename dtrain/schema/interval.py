"""How often something happens (`epoch`, `500`, `5 epochs`, `30 min`), and how long something takes (`12 h`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BeforeValidator, WithJsonSchema

_COUNT = re.compile(r"([1-9]\d*) ?(step|epoch)s?")
_DURATION = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h|d)")
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class Interval:
    """Every so many optimizer steps of the run, or every so many epochs."""

    count: int
    unit: Literal["step", "epoch"]

    @classmethod
    def of(cls, value: object) -> Interval | None:
        """What a setting says; None where it is no such interval."""
        if value == "epoch":
            return cls(1, "epoch")
        if type(value) is int and value > 0:
            return cls(value, "step")
        if isinstance(value, str) and (found := _COUNT.fullmatch(value)):
            return cls(int(found[1]), "step" if found[2] == "step" else "epoch")
        return None

    def is_over(self, step: int, epoch: int) -> bool:
        """Whether one ends after this step of the run, with which `epoch` ends; 0: none does."""
        now = step if self.unit == "step" else epoch
        return now > 0 and now % self.count == 0

    def number(self, step: int, epoch: int) -> int:
        """How many are over after this step, with which `epoch` has ended; 0: none has."""
        return (step if self.unit == "step" else epoch) // self.count

    def __str__(self) -> str:
        return f"{self.count} {self.unit}{'s' * (self.count > 1)}"


def seconds(value: object) -> float | None:
    """The seconds of a duration such as `30 min`; None where it is none, or not above 0."""
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    return float(found[1]) * _SECONDS[found[2]] or None if found else None


def _check_steps_or_epochs(value: object) -> object:
    if Interval.of(value) is None:
        raise ValueError("expected epoch or a number of optimizer steps above 0, or text such as 5 epochs")
    return value


def _check_every(value: object) -> object:
    if Interval.of(value) is None and seconds(value) is None:
        raise ValueError("expected epoch or a number of optimizer steps above 0, or text such as 5 epochs or 30 min")
    return value


def _check_duration(value: object) -> object:
    if seconds(value) is None:
        raise ValueError("expected a time above 0, such as 30 min or 12 h (s, min, h, d)")
    return value


_STEPS = {"type": "integer", "exclusiveMinimum": 0}
_COUNTS = {"type": "string", "pattern": rf"^(epoch|{_COUNT.pattern})$"}
_DURATIONS = {"type": "string", "pattern": f"^{_DURATION.pattern}$"}

# Checked before the type, which would report one error for each that it could be.
StepsOrEpochs = Annotated[
    int | str, BeforeValidator(_check_steps_or_epochs), WithJsonSchema({"anyOf": [_STEPS, _COUNTS]})
]
Every = Annotated[int | str, BeforeValidator(_check_every), WithJsonSchema({"anyOf": [_STEPS, _COUNTS, _DURATIONS]})]
Duration = Annotated[str, BeforeValidator(_check_duration), WithJsonSchema(_DURATIONS)]
