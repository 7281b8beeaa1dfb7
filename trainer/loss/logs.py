"""What a step returns under `log`: values of the user's own, to be reported as means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dtrain.errors import UserError


def read_logs(given: Any, weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """By name each value and its weight, as float64 scalars on the weight's device; made without waiting for it.

    Args:
        given: {name: value or (value, weight)}; each a number, or a tensor of one.
        weight: that of the loss, for values without one of their own.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"step's `log` must be a dict of values by name, it is a {type(given).__name__}")
    return {_name(name): _pair(name, value, weight) for name, value in given.items()}


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise UserError(f"step's `log` needs names as keys, found {name!r}")
    return name


def _pair(name: str, given: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(given, tuple) and len(given) == 2:
        value, own = given
        return _scalar(name, value, weight.device), _scalar(name, own, weight.device)
    return _scalar(name, given, weight.device), weight


def _scalar(name: str, value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.detach().reshape(()).to(device, torch.float64, non_blocking=True)
    if isinstance(value, int | float):
        return torch.full((), float(value), dtype=torch.float64, device=device)
    found = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise UserError(f"the step logs {name} as {found}: give a number, or (number, weight)")
