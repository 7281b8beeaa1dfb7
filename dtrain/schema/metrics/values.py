"""The values that a metric reports, by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

Result: TypeAlias = "float | list[Any]"


def named_values(name: str, result: Any) -> dict[str, Result]:
    """What `compute` returned: a scalar as a float, a tensor as nested lists, an entry of a dict as name_key."""
    if not isinstance(result, Mapping):
        return {name: _plain(result)}
    values: dict[str, Result] = {}
    for key, value in result.items():
        values |= named_values(f"{name}_{key}", value)
    return values


def _plain(result: Any) -> Result:
    if hasattr(result, "tolist"):  # a tensor's, or an array's
        result = result.tolist()
    return [_plain(each) for each in result] if isinstance(result, list | tuple) else float(result)


def values_of_no_sample(name: str, metric: Any) -> dict[str, Result] | None:
    """The values of a torchmetrics metric before its first sample, for their names.

    None where it has none (it keeps samples), or where they may tell too little: others' metrics.
    """
    parts = [part for part in metric.modules() if hasattr(part, "compute")] if hasattr(metric, "modules") else []
    if not parts or any(type(part).__module__.partition(".")[0] != "torchmetrics" for part in parts):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            values = named_values(name, copy.deepcopy(metric).compute())
        except Exception:  # each words it differently
            return None
    return None if [] in values.values() else values or None
