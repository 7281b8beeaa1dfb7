"""What a fit reads, and what each of its phases accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.indexed import Batches
from ..metrics.epoch_totals import Tally


@dataclass(frozen=True)
class FitData:
    """The batches of training and validation, with the tallies of an epoch.

    Attributes:
        val_tallies: of the validation with the weights, and with their average where there is one.
    """

    train: Batches
    train_tally: Tally
    val: Batches | None = None
    val_tallies: Sequence[Tally] = ()

    @property
    def tallies(self) -> list[Tally]:
        """Those of all phases, training's first."""
        return [self.train_tally, *self.val_tallies]
