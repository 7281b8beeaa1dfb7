"""What a batch's gradient is divided by, so that it is that of the whole batch's mean."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..data.indexed import MicroBatch
from ..distributed.torch_private import multiply_
from ..distributed.world import World
from .step import Outcome


class BatchWeight:
    """A batch's weight, which its gradient is divided by: its samples, or the units that a step has counted.

    The number of samples is known from the start, so that each part's loss is divided by it. How many units all ranks
    have is known only after the last part: until then the gradient is one per sample, and is corrected afterwards.

    Attributes:
        own: the units of this rank's parts so far; None where they are its samples.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._samples = 0  # over all ranks
        self._summed: Callable[[], Tensor] | None = None
        self.own: Tensor | None = None

    @property
    def is_summed(self) -> bool:
        """Whether the gradient is still to be corrected, by the sum of all ranks' units."""
        return self._summed is not None

    def scale(self, outcome: Outcome, part: MicroBatch) -> float | Tensor:
        """The factor for a part's summed loss before its backward pass.

        All ranks take part, at the batch's last part, in a sum that overlaps with that pass.
        """
        # DDP averages over the ranks where the batch's gradient is a sum over them: hence the world size.
        self._samples = part.batch_samples
        scale = self._world.world_size / part.batch_samples
        if outcome.weight is None:
            return scale
        self.own = outcome.weight if self.own is None else self.own + outcome.weight
        if part.is_whole and self._world.world_size == 1:
            return 1.0 / self.own.where(self.own != 0, 1.0).to(outcome.total.dtype)
        if part.is_last:
            self._summed = self._world.begin_sum(self.own)
        return scale

    def rescale(self, gradients: list[Tensor]) -> None:
        """Turn the gradients of the mean over the batch's samples into those of the mean over all ranks' units."""
        assert self._summed is not None
        units = self._summed()
        scale = self._samples / units.where(units != 0, 1.0)  # no unit counts: the gradients are zeros, as torch's are
        multiply_(gradients, scale.to(gradients[0].device, gradients[0].dtype))
