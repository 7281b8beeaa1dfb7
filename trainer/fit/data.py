"""What a fit reads, and what each of its phases accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.indexed import Batches, Data
from ..metrics.epoch_totals import Tally


@dataclass(frozen=True)
class ValidationSet:
    """A set to validate on.

    Attributes:
        given: what it was handed over as.
        tallies: of the validation with the weights, and with their average where there is one.
    """

    given: Data
    batches: Batches
    tallies: Sequence[Tally]


@dataclass(frozen=True)
class FitData:
    """The batches of training and validation, with the tallies of an epoch."""

    train: Batches
    train_tally: Tally
    val: Sequence[ValidationSet] = ()

    @property
    def val_tallies(self) -> list[Tally]:
        """Those of the validation, set by set."""
        return [tally for each in self.val for tally in each.tallies]

    @property
    def tallies(self) -> list[Tally]:
        """Those of all phases, training's first."""
        return [self.train_tally, *self.val_tallies]
