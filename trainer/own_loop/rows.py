"""A row of the values that a loop of the user's own reports."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, cast

from dtrain.errors import UserError
from dtrain.run.folder import Row
from dtrain.schema.metrics.values import named_values
from dtrain.stderr import say

from ..distributed.world import World
from ..metrics.early_stopping import Best
from ..metrics.logged import Logged
from ..metrics.reduce import reduce_states
from .place import Place

_PHASES = ("train", "val")


def head_of(place: Place, share_done: float, lr: float, samples_per_s: float | None) -> Row:
    """What a row has besides values.

    Args:
        share_done: of the epoch.
        lr: of the last step.
        samples_per_s: in training, since the last row; None: there was none.
    """
    return {
        "epoch": place.epoch - 1 + share_done if place.active else place.epoch,
        "step": place.step,
        "phase": "train",
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "lr": lr,
        "samples_per_s": samples_per_s,
    }


def require_monitored(best: Best, world: World, *, is_chosen: bool) -> None:
    """After the first epoch: is there a value to tell the best weights by? Else it is refused, or warned of.

    Args:
        is_chosen: whether the user has asked for something that goes by it.
    """
    if best.step or best.epoch:
        return
    name = best.monitor
    problem = f"no row of epoch 1 has {name}, by which the best weights are chosen: Ranks.report({name}=...)"
    if is_chosen:
        raise UserError(f"Ranks.epochs: {problem}")
    if world.is_main:
        say(f"warning: {problem}, or Ranks.epochs(..., monitor=...); there will be no weights/best.pt")


def row_of(world: World, head: Row, values: Mapping[str, Any], logged: Logged) -> Row:
    """Rank 0's values, and the means of what all ranks have logged, on all ranks. All take part.

    Args:
        head: what a row has besides, rank 0's too.

    Raises:
        UserError: a value can't be reported; on all ranks.
    """
    names = world.gather(sorted(values))
    for rank, found in enumerate(names):
        if found != names[0]:
            given = f"{', '.join(names[0])} on rank 0, {', '.join(found)} on rank {rank}"
            raise UserError(f"Ranks.report was given {given}: all ranks report the same names")
    reduced = reduce_states([logged.state()])
    row: Row = {}
    refused = ""
    if reduced is not None and world.is_main:
        try:
            row = _made(head, _numbers(values), Logged.finish(cast("list[Any]", reduced[0])))
        except UserError as error:
            refused = str(error)
    row, refused = world.from_main((row, refused))
    if refused:
        raise UserError(refused)
    return row


def _numbers(values: Mapping[str, Any]) -> Row:
    named: Row = {}
    for name, value in values.items():
        try:
            named |= named_values(name, value)
        except (TypeError, ValueError) as error:
            kind = type(value).__name__
            raise UserError(f"Ranks.report: {name} is a {kind}, expected a number or what `compute` gave") from error
    return named


def _made(head: Row, named: Row, logged: Mapping[str, float]) -> Row:
    if taken := [name for name in named if name in head] + [name for name in logged if name in {*head, *named}]:
        raise UserError(f"Ranks.report: there is another value called {', '.join(taken)}; choose another name")
    values = {**named, **logged}
    phases = [phase for phase in _PHASES if any(name.startswith(f"{phase}_") for name in values)]
    return {**head, "phase": "+".join(phases) or head["phase"], **values}
