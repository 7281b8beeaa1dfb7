"""Whether a run still learns something: seen from its losses, and from the weights where a loss is no number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from dtrain.errors import UserError
from dtrain.run import Row

from .parallel import Parallel

_MEND = "a smaller learning rate or fit.clip_norm may help, fit.on_nonfinite: stop names the first such step"


class Learning:
    """Ends a run whose weights are no numbers any more, or that has nothing to learn from.

    A loss that is not finite doesn't yet mean that: fp16's scaler leaves such steps out, and a sample may be at fault.

    Args:
        report: told of losses that are not finite while the run goes on.
    """

    def __init__(self, model: Parallel, optimizer: Optimizer, report: Callable[[str], None]) -> None:
        self._model = model
        self._optimizer = optimizer
        self._report = report
        self._norm = math.nan  # of the weights with which the epoch began
        self._first_step = 1
        self._seen = self._in_doubt = False

    def see(self, loss: float) -> None:
        """Take in a loss that this rank happens to know."""
        if not (math.isfinite(loss) or self._seen):
            self._seen = self._in_doubt = True

    def take_doubt(self) -> bool:
        """Whether the weights should be looked at, by all ranks together: once an epoch."""
        in_doubt, self._in_doubt = self._in_doubt, False
        return in_doubt

    def begin(self, step: int) -> None:
        """Begin an epoch, after so many steps. All ranks take part."""
        self._first_step = step + 1
        self._seen = self._in_doubt = False
        self._norm = self._weights()

    def require_finite(self, step: int) -> None:
        """Raise UserError where the weights after so many steps are not finite. All ranks take part."""
        if not math.isfinite(self._weights()):
            raise UserError(f"the weights are not finite after {self._steps(step)}, and with them the loss; {_MEND}")

    def judge(self, row: Row) -> None:
        """Look at an epoch's losses. All ranks take part, with the same row.

        Raises:
            UserError: the run learns nothing, or can't be judged.
        """
        losses = {name: row.get(name) for name in ("train_loss", "val_loss", "ema_loss")}
        odd = {name: value for name, value in losses.items() if isinstance(value, float) and not math.isfinite(value)}
        if not odd:
            return
        step = int(row["step"])
        self.require_finite(step)
        said = f"epoch {row['epoch']}, {self._steps(step)}: " + ", ".join(f"{n} is {v}" for n, v in odd.items())
        if "train_loss" in odd and self._weights() == self._norm:
            raise UserError(f"{said}, and the weights are what they were before: nothing is learned")
        if untrue := [name for name, value in odd.items() if name != "train_loss" and math.isnan(value)]:
            cause = (
                "its samples, or statistics that batch norm keeps, hold nan or inf, or a rank had none that counts, "
            )
            cause += "as with ignore_index: a step then returns its `weight`"
            raise UserError(f"{said}; the weights are finite, so it is {untrue[0]} itself that is at fault: {cause}")
        self._report(f"{said}; the weights are finite, and training goes on")

    def _weights(self) -> float:
        """The norm of all that is trained. All ranks take part where each has a part; waits for the device."""
        with torch.no_grad():
            weights = [p.detach() for group in self._optimizer.param_groups for p in group["params"]]
            return float(self._model.norm([each for each in weights if each.is_floating_point() or each.is_complex()]))

    def _steps(self, step: int) -> str:
        return f"steps {self._first_step} to {step}" if step > self._first_step else f"step {step}"
