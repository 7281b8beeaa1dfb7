"""The values that a step logs: means over all steps and ranks, made as the loss is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dtrain.errors import UserError

from .reduce import LocalState


class Logged:
    """For each name a sum of values times their weights, and of these weights, on this rank.

    Args:
        taken: names that are reported already.
    """

    def __init__(self, device: torch.device, taken: Collection[str]) -> None:
        self._device = device
        self._taken = taken
        self._sums: dict[str, Tensor] = {}  # [2]: of the values, of the weights
        self._has_samples = False

    def add(self, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a micro-batch's values, each with its weight, without waiting for the device."""
        self._has_samples = True
        for name, (value, weight) in values.items():
            if name not in self._sums:
                self._require_free(name)
                self._sums[name] = torch.zeros(2, dtype=torch.float64, device=self._device)
            # A mean of nothing is nan, and counts nothing.
            self._sums[name] += torch.stack([value.where(weight != 0, 0.0) * weight, weight])

    def _require_free(self, name: str) -> None:
        if name in self._taken:
            what = "that is the loss" if name == "loss" else "a metric has that name"
            raise UserError(f"the step logs {name!r}, but {what}: give it another name")

    def state(self) -> LocalState:
        """The state for the synchronisation: a rank without a sample does not know the names."""
        return LocalState([dict(self._sums)] if self._has_samples else [], "stack")

    @staticmethod
    def finish(ranks: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """The mean of each name.

        Args:
            ranks: the sums of those that had samples.

        Raises:
            UserError: they have logged other names.
        """
        names = dict.fromkeys(name for sums in ranks for name in sums)
        if some := [name for name in names if any(name not in sums for sums in ranks)]:
            raise UserError(
                f"the step logs {', '.join(some)} on some ranks but not on others, so that the value would depend on "
                "their number: log the same names everywhere, as (0.0, 0) where there is nothing to count"
            )
        values = {name: torch.stack([sums[name].cpu() for sums in ranks]).sum(0) for name in names}
        return {name: float(value / weight) for name, (value, weight) in values.items()}

    def reset(self) -> None:
        self._sums.clear()
        self._has_samples = False

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "has_samples": self._has_samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: sums.to(self._device, copy=True) for name, sums in state["sums"].items()}
        self._has_samples = state["has_samples"]

    def load_merged(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Take over the sums of all ranks of another number of ranks."""
        self.reset()
        for state in states:
            self._has_samples |= state["has_samples"]
            for name, sums in state["sums"].items():
                before = self._sums.get(name, torch.zeros_like(sums, device=self._device))
                self._sums[name] = before + sums.to(self._device)
