"""Several validation or test sets: their names, which stand between the phase and the value, as in val_clean_acc."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")


def name_problem(names: Collection[object]) -> str | None:
    """Why these can't be the names of a phase's sets, or None."""
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            return f"a set's name consists of letters, digits and '_' and begins with a letter, unlike {name!r}"
        if name == "loss":
            return "a set is named loss, as the value val_loss is; give it another name"
    return None


def clash(phases: Collection[str], metrics: Collection[str]) -> str | None:
    """What two sets would report under one name, or None: sets `a` and `a_b`, with metrics `c` and `b_c`."""
    seen: dict[str, str] = {}
    for phase in phases:
        for value in ("loss", *metrics):
            reported = f"{phase}_{value}"
            if reported in seen:
                both = f"{value} of {phase} and a value of {seen[reported]}"
                return f"{reported} would be both {both}; rename the set or the metric"
            seen[reported] = phase
    return None


def phase_of(place: str) -> str:
    """What begins the names of the values of a set at this place in `data`: val_clean for val.clean."""
    return place.replace(".", "_")


def value_of(reported: str, phases: Iterable[str]) -> str:
    """The value that one of the phases reports under this name: acc for val_clean_acc; empty where none does."""
    own = [phase for phase in phases if reported.startswith(f"{phase}_")]
    return reported.removeprefix(f"{max(own, key=len)}_") if own else ""


def default_monitor(phases: Sequence[str]) -> str:
    """What decides which weights are best where nothing else is said: the loss of the validation, else training's.

    Args:
        phases: of the validation.
    """
    return f"{phases[0] if phases else 'train'}_loss"


def monitor_missing(phases: Sequence[str]) -> str | None:
    """What is wrong if nothing is said of what decides which weights are best: with several sets it could be any."""
    if len(phases) < 2:
        return None
    losses = ", ".join(f"{phase}_loss" for phase in phases)
    return f"missing; with several validation sets, name what decides which weights are best: {losses} or another value"
