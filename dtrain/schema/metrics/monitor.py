"""Whether a monitor names a single number that every epoch reports, as far as that is known beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from dtrain.errors import among

Known = Mapping[str, "Mapping[str, Any] | None"]


def monitor_problem(monitor: str, known: Known, *, may_log: bool = False) -> str | None:
    """What is wrong with the monitor's name, or None.

    Args:
        may_log: whether a step of the user's own may report other values of the same phases.
        known: by name what is reported; for each its values by their names, or None where samples must tell: a metric
            NAME reports a value NAME, or several, NAME_key.
    """
    values = {name: value for each in known.values() for name, value in (each or {}).items()}
    if monitor in values:
        value = values[monitor]
        if isinstance(value, list):
            return f"{monitor} is a list of {len(value)} values, and only a single number can be monitored"
        return None
    untold = [name for name, each in known.items() if each is None]
    if any(monitor == name or monitor.startswith(f"{name}_") for name in untold):
        return None
    # Each phase reports its loss.
    if may_log and any(monitor.startswith(name.removesuffix("loss")) for name in known if name.endswith("_loss")):
        return None
    return f"nothing is reported as {monitor}; {among(monitor, [*values, *untold])}"


def reports(row: Mapping[str, Any], phase: Literal["train", "val"]) -> bool:
    """Whether a row reports the training, or a validation."""
    return phase in row.get("phase", "").split("+")


def covers(row: Mapping[str, Any], monitor: str) -> bool:
    """Whether a row reports what the monitored value is one of: the training, or a validation."""
    phase = monitor.partition("_")[0]
    return reports(row, "train" if phase == "train" else "val") if phase in ("train", "val", "ema") else True
