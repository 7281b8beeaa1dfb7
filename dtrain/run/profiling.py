"""Which steps of a run are to be profiled, and on which ranks: `steps=10-14,ranks=0,1`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dtrain.errors import UserError

_FORM = re.compile(r"steps=([1-9]\d*)(?:-([1-9]\d*))?(?:,ranks=(\d+(?:,\d+)*))?")


@dataclass(frozen=True)
class Profiling:
    """Steps `first` to `last`, counted from the run's beginning, on these ranks."""

    first: int
    last: int
    ranks: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, text: str) -> Profiling:
        """What is written so; raises UserError for anything else."""
        found = _FORM.fullmatch(text.replace(" ", ""))
        if found is None:
            raise UserError(f"--profile {text}: expected steps=10-14, or steps=10-14,ranks=0,1")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise UserError(f"--profile {text}: step {last} is before step {first}")
        return cls(first, last, tuple(map(int, (found[3] or "0").split(","))))

    def require_ranks(self, num_ranks: int) -> None:
        """Raise UserError if the run has no such rank."""
        if max(self.ranks) >= num_ranks:
            raise UserError(f"profile: there is no rank {max(self.ranks)}; the last is {num_ranks - 1}")
