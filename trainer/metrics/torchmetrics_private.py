"""torchmetrics' private parts, all that are used here. tests/house/test_private_parts.py covers upgrades.

What dtrain/schema/metrics/logits.py looks for in its code is no part of its interface either, and is in that test too.
"""

from __future__ import annotations

from typing import Any

from torchmetrics import Metric


def reductions(metric: Metric) -> dict[str, Any]:
    """How each state of several ranks becomes one: what `add_state` was given, and nothing public gives back."""
    found: dict[str, Any] = metric._reductions
    return found


def set_update_count(metric: Metric, count: int) -> None:
    """Have it believe that it was updated so often: `update_count` can be read, and not be set.

    Its states are put in from elsewhere, of a checkpoint or of all ranks, and a metric without an update warns.
    """
    metric._update_count = count


def forget_result(metric: Metric) -> None:
    """Have the next `compute` compute: what it has kept is of other states. `reset` would forget the states as well."""
    metric._computed = None
