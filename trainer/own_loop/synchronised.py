"""Metrics over all ranks, for a loop of the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..distributed.world import World
from ..metrics.reduce import reduce_states
from .sharded import Hand
from .tracked import Tracked

if TYPE_CHECKING:  # as in ranks.py
    from dtrain.schema.metrics.values import Result

    from ..metrics.metric_set import MetricSet


class Synchronised:
    """A metric over all ranks.

    Args:
        own: of this rank's samples, with the metric of that name alone.
    """

    def __init__(self, world: World, hand: Hand, tracked: Tracked, name: str, own: MetricSet) -> None:
        self._world = world
        self._hand = hand
        self._tracked = tracked
        self._name = name
        self._own = own

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Take in a batch of this rank, by the metric's own arguments: predictions and target mostly. No collective."""
        from ..metrics.metric_set import Arguments

        if self._hand.has_samples:
            samples = None if self._hand.part is None else self._hand.part.samples
            given = {self._name: Arguments(args, kwargs)}
            self._own.update(None, None, given, batch=self._tracked.num_batches, samples=samples)

    def compute(self) -> Result | dict[str, Result]:
        """The value, on all ranks: a number, lists of numbers, or such by name. All ranks take part."""
        loop = self._hand.running
        return self._compute() if loop is None else loop.state.once(self._compute)

    def _compute(self) -> Result | dict[str, Result]:
        kept = self._own.state_dict()
        reduced = reduce_states(self._own.states())
        values = {} if reduced is None else self._own.finish(reduced)
        self._own.load_state_dict(kept)  # more may be added
        values = self._world.from_main(values)
        return values.get(self._name, values)

    def reset(self) -> None:
        """Forget all samples."""
        self._own.reset()
