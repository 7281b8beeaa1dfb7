"""Whether a run still learns: judged by its losses, and by the weights if a loss is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dtrain.errors import UserError
from dtrain.run.folder import Row
from dtrain.schema.metrics.monitor import reports

from ..checks.optimizer_kinds import require_rates
from ..strategies.base import Parallel

_MEND = "a smaller learning rate or fit.clip_norm may help, fit.on_nonfinite: stop names the first such step"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number


class Learning:
    """Ends a run whose weights are no longer finite, or that learns nothing.

    A non-finite loss does not prove that: fp16's scaler skips such steps, and a single sample may be at fault.

    Args:
        losses: the names of those that rows report: training's, and of each validation.
        report: called for non-finite losses while the run continues.
        scales: whether steps are skipped until a scale for the loss is found (fp16).
    """

    def __init__(
        self,
        model: Parallel,
        optimizer: Optimizer,
        losses: Sequence[str],
        report: Callable[[str], None],
        *,
        scales: bool = False,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._losses = losses
        self._report = report
        self._scales = scales
        self._weights: list[Tensor] = []  # what was trained at the last `begin`
        self._norm = math.nan  # of these, then
        self._first: list[Tensor] = []  # what was trained when the run began
        self._untouched: int | None = None  # the checksum of these, then, until they have changed
        self._first_step = 1
        self._seen = self._in_doubt = False

    def see(self, loss: float) -> None:
        """Note a loss that this rank happens to know."""
        if not (math.isfinite(loss) or self._seen):
            self._seen = self._in_doubt = True

    def take_doubt(self) -> bool:
        """Whether all ranks should check the weights together: once per row."""
        in_doubt, self._in_doubt = self._in_doubt, False
        return in_doubt

    def begin(self, step: int) -> None:
        """Begin with what the next row will report, after so many steps. All ranks take part.

        Raises:
            UserError: a scheduler has set an unusable learning rate.
        """
        require_rates(self._optimizer, step)
        self._first_step = step + 1
        self._seen = self._in_doubt = False
        self._weights = self._model.trained(self._optimizer)
        self._norm = self._norm_of(self._weights)
        if step == 0:
            self._first, self._untouched = self._weights, _checksum(self._weights)

    def require_finite(self, step: int) -> None:
        """Raise UserError where the weights after so many steps are not finite. All ranks take part."""
        require_rates(self._optimizer, step)
        if not math.isfinite(self._norm_of(self._model.trained(self._optimizer))):
            raise UserError(f"the weights are not finite after {self._steps(step)}, and with them the loss; {_MEND}")

    def judge(self, row: Row, *, epoch_ends: bool, is_last: bool) -> None:
        """Judge a row. All ranks take part, with the same row.

        Args:
            epoch_ends: whether an epoch has ended with it: fewer steps may have nothing to learn from.
            is_last: whether no other follows.

        Raises:
            UserError: the run learns nothing, or can't be judged.
        """
        self._judge_losses(row)
        if self._untouched is not None and (epoch_ends or is_last or reports(row, "val")):
            self._judge_weights(row, self._untouched, is_last=is_last)

    def _judge_losses(self, row: Row) -> None:
        losses = {name: row.get(name) for name in self._losses}
        odd = {name: value for name, value in losses.items() if isinstance(value, float) and not math.isfinite(value)}
        if not odd:
            return
        step = int(row["step"])
        self.require_finite(step)
        said = f"{self._since(row)}: " + ", ".join(f"{n} is {v}" for n, v in odd.items())
        if "train_loss" in odd and self._norm_of(self._weights) == self._norm:
            raise UserError(f"{said}, and the weights have not changed: nothing is learned")
        if untrue := [name for name, value in odd.items() if name != "train_loss" and math.isnan(value)]:
            cause = (
                "its samples, or statistics that batch norm keeps, hold nan or inf, or a rank had none that counts, "
            )
            cause += "as with ignore_index: a step then returns its `weight`"
            raise UserError(f"{said}; the weights are finite, so it is {untrue[0]} itself that is at fault: {cause}")
        self._report(f"{said}; the weights are finite, and training goes on")

    def _judge_weights(self, row: Row, untouched: int, *, is_last: bool) -> None:
        """Check whether any step since the run began has changed a weight. All ranks take part."""
        world = self._model.world
        if world.sum(torch.tensor(float(_checksum(self._first) != untouched), device=world.device)):
            self._first, self._untouched = [], None
            return
        said = f"{self._since(row)}: the weights have not changed"
        if row.get("train_loss") == 0:
            self._report(f"{said}, and train_loss is 0: there is nothing to learn")
        elif is_last or not self._may_begin_later(row):
            raise UserError(
                f"{said}: nothing is learned; the loss has no gradient (a sign, a round, a factor of 0), it depends on "
                f"none of what the optimizer has, or the learning rate ({row['lr']:.4g}) is too small"
            )

    def _may_begin_later(self, row: Row) -> bool:
        """Whether later steps may change weights though this epoch's did not: a warm-up, a scale still to be found."""
        return self._scales or row["lr"] == 0

    def _norm_of(self, weights: list[Tensor]) -> float:
        """Their norm. All ranks take part where each has a part; waits for the device."""
        with torch.no_grad():
            numbers = [each.detach() for each in weights if each.is_floating_point() or each.is_complex()]
            return float(self._model.norm(numbers))

    def _since(self, row: Row) -> str:
        """What the row covers."""
        steps = self._steps(int(row["step"]))
        return f"epoch {row['epoch']}, {steps}" if isinstance(row["epoch"], int) else steps

    def _steps(self, step: int) -> str:
        return f"steps {self._first_step} to {step}" if step > self._first_step else f"step {step}"


def _checksum(weights: list[Tensor]) -> int:
    """A checksum over all bits of this rank's parts of them. Waits for the device."""
    sums = [_sum_of_bits(weight) for weight in weights]
    return int(torch.stack([each.to(sums[0].device) for each in sums]).sum()) if sums else 0


def _sum_of_bits(weight: Tensor) -> Tensor:
    """The sum of its numbers' bits, read as integers: exact, whatever the order."""
    own = (weight.to_local() if isinstance(weight, DTensor) else weight).detach()
    numbers = torch.view_as_real(own) if own.is_complex() else own
    return numbers.view(_INTEGERS[numbers.element_size()]).sum(dtype=torch.int64)
