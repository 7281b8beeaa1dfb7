"""Batches gathered for metrics that may be updated with many at once: 64 samples cost an update as much as 1,000.

Such are torchmetrics' own that only count: all they keep are whole numbers, and what a sample adds to them depends on
that sample alone. However the samples are divided among updates, the counts are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection, classification
from torchmetrics.utilities.data import dim_zero_sum

from .given_metrics import AnyMetric
from .torchmetrics_private import reductions

MOST_BATCHES = 16
MOST_BYTES = 2**22  # on the batches' device; larger batches gain nothing

# Those from which accuracy, precision, recall, F1, Jaccard, kappa, curves with given thresholds and so on are derived.
# tests/trainer/metrics/test_blocks.py compares all of them with updates one by one.
_COUNTING = (
    *(classification.BinaryStatScores, classification.MulticlassStatScores, classification.MultilabelStatScores),
    *(classification.BinaryConfusionMatrix, classification.MulticlassConfusionMatrix),
    *(classification.MultilabelConfusionMatrix, classification.BinaryPrecisionRecallCurve),
    *(classification.MulticlassPrecisionRecallCurve, classification.MultilabelPrecisionRecallCurve),
    *(classification.MulticlassExactMatch, classification.MultilabelExactMatch),
)
_UPDATES = {kind.update for kind in _COUNTING}


def only_counts(metric: AnyMetric) -> bool:
    """Whether the metric, or each of a collection, is one of those. What others derive from them may do otherwise."""
    members = metric.values(copy_state=False) if isinstance(metric, MetricCollection) else [metric]
    return all(map(_only_counts, members))


def _only_counts(metric: Metric) -> bool:
    is_known = type(metric).__module__.partition(".")[0] == "torchmetrics" and type(metric).update in _UPDATES
    return is_known and all(
        isinstance(state, Tensor) and not state.is_floating_point() and reductions(metric)[name] is dim_zero_sum
        for name, state in metric.metric_state.items()
    )


class Block:
    """Predictions and targets of several batches of one size.

    They are copied: a loader, or a compiled model, may use the memory of what it gave again.

    Args:
        hand_on: is given those of all batches that are gathered.
    """

    def __init__(self, hand_on: Callable[[Tensor, Tensor], None]) -> None:
        self._hand_on = hand_on
        self._kind: tuple[object, ...] = ()  # of the last batch
        self._room: list[Tensor] = []  # for predictions and targets: a first dimension of batches
        self._slots: list[tuple[Tensor, Tensor]] = []  # each batch's part of it
        self._filled = 0

    def add(self, predictions: Tensor, target: Tensor) -> None:
        """Take in a batch, or hand it on: one of another size than that before it, or of which two are too large."""
        kind = (predictions.shape, predictions.dtype, predictions.device, target.shape, target.dtype, target.device)
        if kind != self._kind:
            self.finish()
            self._kind, self._room, self._slots = kind, [], []
            self._hand_on(predictions, target)
            return
        if not self._room:  # the second one in a row
            self._make_room(predictions, target)
        if not self._slots:
            self._hand_on(predictions, target)
            return
        own_predictions, own_target = self._slots[self._filled]
        own_predictions.copy_(predictions)
        own_target.copy_(target)
        self._filled += 1
        if self._filled == len(self._slots):
            self.finish()

    def finish(self) -> None:
        """Hand on what is there."""
        if self._filled:
            predictions, target = (room[: self._filled].flatten(0, 1) for room in self._room)
            self._filled = 0
            self._hand_on(predictions, target)

    def clear(self) -> None:
        """Forget what is there."""
        self._filled = 0

    def _make_room(self, *pair: Tensor) -> None:
        batches = min(MOST_BATCHES, MOST_BYTES // max(sum(part.nbytes for part in pair), 1))
        self._room = [part.new_empty((batches if batches > 1 else 0, *part.shape)) for part in pair]
        self._slots = list(zip(*self._room, strict=True))


def fits(predictions: object, target: object) -> bool:
    """Whether a block can hold them: plain tensors with a row for each sample."""
    return (
        type(predictions) is type(target) is Tensor
        and predictions.ndim > 0 < target.ndim
        and len(predictions) == len(target)
        and predictions.layout is target.layout is torch.strided
    )
