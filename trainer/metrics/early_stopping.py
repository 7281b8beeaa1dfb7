"""Which epoch is the best so far, and whether to continue."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from dtrain.errors import UserError, among
from dtrain.run.folder import Row


@dataclass
class Best:
    """The best epoch by a monitored value. Ties keep the earlier; nan is never better.

    Attributes:
        patience: epochs in a row without improvement after which training ends; None: never.
    """

    monitor: str
    mode: str = "min"
    patience: int | None = None
    value: float = math.nan
    epoch: int = 0
    stale_epochs: int = 0

    def update(self, row: Row) -> bool:
        """Take in an epoch's row; whether it is the best so far (the first one always is).

        Raises:
            UserError: the row has no single number under the monitor's name.
        """
        value = row.get(self.monitor)
        if not isinstance(value, float):
            names = [name for name, found in row.items() if isinstance(found, float)]
            raise UserError(f"monitor {self.monitor} is not a single value of this epoch; {among(self.monitor, names)}")
        better = value < self.value if self.mode == "min" else value > self.value
        if self.epoch == 0 or better or (math.isnan(self.value) and not math.isnan(value)):
            self.value, self.epoch, self.stale_epochs = value, int(row["epoch"]), 0
            return True
        self.stale_epochs += 1
        return False

    @property
    def is_of_average(self) -> bool:
        """Whether the moving average of the weights is monitored."""
        return self.monitor.startswith("ema_")

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.stale_epochs >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "epoch": self.epoch, "stale_epochs": self.stale_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.epoch, self.stale_epochs = state["value"], state["epoch"], state["stale_epochs"]
