"""Writes results (weights/last.pt, weights/best.pt, metrics.jsonl) on rank 0, off the training thread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.errors import UserError
from dtrain.run.folder import RunDir

from ..data.batch_tensors import map_tensors
from ..model.buffers import copied, is_extra
from ..model.weights import save_weights
from .background import Copied, Copies, Disk
from .history import History


class Results:
    """Rank 0's results. What the disk refuses is reported and kept, and written with the next ones.

    Attributes:
        history: the rows of metrics.jsonl.
    """

    def __init__(self, run: RunDir, disk: Disk) -> None:
        self._run = run
        self._disk = disk
        self._copies = Copies()
        self.history = History(run, disk)
        self._weights: dict[Path, dict[str, Any]] = {}  # not yet written

    def snapshot(self, weights: Mapping[Path, Mapping[str, Any]]) -> None:
        """Copy the weights, for `write`; the previous ones must have been written, or refused.

        Args:
            weights: whole state_dicts, by the files that are to hold them.
        """
        if self._weights.keys() - weights.keys():
            self._copies = Copies()  # the old ones are not yet written
        live = {path: each for path, each in weights.items() if not isinstance(each, Copied)}
        named = {(path, name): value for path, each in live.items() for name, value in each.items()}
        extra = {place: value for place, value in named.items() if is_extra(place[1])}
        copies: dict[Any, Any] = self._copies.of({place: named[place] for place in named if place not in extra})
        copies |= {place: map_tensors(Tensor.cpu, copied(value)) for place, value in extra.items()}
        self._weights |= {path: {name: copies[path, name] for name in each} for path, each in live.items()}
        self._weights |= {path: each for path, each in weights.items() if isinstance(each, Copied)}

    def write(self) -> None:
        """Write the weights that are still to be written."""
        for path, weights in list(self._weights.items()):
            with self._disk.tolerated(f"write weights/{path.name}"):
                save_weights(weights, path)
                del self._weights[path]

    def finish(self) -> None:
        """Try again to write what is missing, at the end of the training.

        Raises:
            UserError: it can't be written: the run's results are incomplete.
        """
        self.write()
        missing = [path.name for path in self._weights] + ["metrics.jsonl"] * (not self.history.finish())
        if missing:
            raise UserError(f"training is done, but {', '.join(missing)} could not be written in {self._run}")
