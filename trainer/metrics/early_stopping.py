"""Which weights are the best so far, and whether to continue."""

from __future__ import annotations

import math
from typing import Any

from dtrain.errors import UserError, among
from dtrain.run.folder import Row
from dtrain.schema.sections import EarlyStopping


class Best:
    """The best moment of a fit by a monitored value, of those rows that have it. Ties keep the earlier; nan is
    never better.

    Args:
        settings: with the monitor's name.

    Attributes:
        value, epoch, step: of the best row; epoch and step 0 before the first.
        stale: how many rows in succession were no improvement by `min_delta`.
    """

    def __init__(self, settings: EarlyStopping) -> None:
        assert settings.monitor is not None
        self.monitor = settings.monitor
        self.mode = settings.mode
        self._settings = settings
        self.value = self._last = self._reference = math.nan
        self.epoch: float = 0
        self.step = 0
        self.stale = 0

    def update(self, row: Row) -> bool:
        """Take in a row; whether it is the best so far (the first one always is).

        Raises:
            UserError: the row has no single number under the monitor's name.
        """
        value = row.get(self.monitor)
        if not isinstance(value, float):
            names = [name for name, found in row.items() if isinstance(found, float)]
            raise UserError(f"monitor {self.monitor} is not a single value of this epoch; {among(self.monitor, names)}")
        is_first, self._last = self.epoch == self.step == 0, value
        if is_first or self._is_better(value, self._reference, self._settings.min_delta):
            self._reference, self.stale = value, 0
        else:
            self.stale += 1
        if is_first or self._is_better(value, self.value):
            self.value, self.epoch, self.step = value, row["epoch"], int(row["step"])
            return True
        return False

    def _is_better(self, value: float, than: float, by: float = 0.0) -> bool:
        if math.isnan(than):
            return not math.isnan(value)
        return value < than - by if self.mode == "min" else value > than + by

    @property
    def is_of_average(self) -> bool:
        """Whether the moving average of the weights is monitored."""
        return self.monitor.startswith("ema_")

    @property
    def is_stopped_by_nan(self) -> bool:
        """Whether the fit should end since the last value is nan or infinite."""
        return self._settings.stop_on_nan and self.step > 0 and not math.isfinite(self._last)

    @property
    def verdict(self) -> str | None:
        """Why the fit should end now; None: it should go on."""
        patience, threshold = self._settings.patience, self._settings.threshold
        if patience is not None and self.stale >= patience:
            return f"{self.monitor} has not improved {patience} times in a row"
        if self.is_stopped_by_nan:
            return f"{self.monitor} is {self._last}"
        if threshold is not None and (self.value <= threshold if self.mode == "min" else self.value >= threshold):
            return f"{self.monitor} has reached {threshold:g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        best = {"value": self.value, "epoch": self.epoch, "step": self.step}
        return {**best, "last": self._last, "reference": self._reference, "stale_epochs": self.stale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.epoch, self.step = state["value"], state["epoch"], state.get("step", 0)
        # Checkpoints of version 0.1 know no min_delta.
        self._last, self._reference = state.get("last", self.value), state.get("reference", self.value)
        self.stale = state["stale_epochs"]
