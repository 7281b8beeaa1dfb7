"""What a script has made by Ranks, with what a loop of its own needs to continue: loaders, metrics, logged values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from ..data.indexed import Batches
from ..distributed.seeds import derive_seed, rng_state, seed_everything, set_rng_state
from ..distributed.world import World
from ..metrics.logged import Logged

if TYPE_CHECKING:  # as in ranks.py
    from ..metrics.metric_set import MetricSet


@dataclass(eq=False)
class Loader:
    """A loader of the script's.

    Attributes:
        number: in the order in which the script made them.
        epoch: which iteration over it has begun last.
        micro_batch_size: of a rank, where batches are cut.
    """

    number: int
    batches: Batches
    micro_batch_size: int | None
    epoch: int = 0


class Tracked:
    """What a rank has, each with the number of its making; what the script forgets is forgotten here.

    Attributes:
        num_batches: that the loop has had in hand, as many on all ranks.
        is_seeded: whether ranks draw random numbers of their own.
        logged: what `Ranks.log` has added up.
    """

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._seed = seed
        self._loaders: WeakValueDictionary[int, Loader] = WeakValueDictionary()
        self._metrics: WeakValueDictionary[int, MetricSet] = WeakValueDictionary()
        self._made = self.num_metrics = 0
        self.num_batches = 0
        self.is_seeded = False
        self.logged = Logged(world.device, ())

    def add_loader(self, batches: Batches, micro_batch_size: int | None) -> Loader:
        loader = self._loaders[self._made] = Loader(self._made, batches, micro_batch_size)
        self._made += 1
        return loader

    def add_metric(self, metric: MetricSet) -> MetricSet:
        """Know it from now on. Those of an epoch's own get the same numbers in each epoch, see `num_metrics`."""
        self._metrics[self.num_metrics] = metric
        self.num_metrics += 1
        return metric

    def share_done(self, active: Mapping[int, int]) -> float:
        """Of the outermost iteration, by the batches done of each loader; 0 where its length is not known."""
        for number, done in active.items():
            steps = self._loaders[number].batches.num_steps
            return done / steps if steps else 0.0
        return 0.0

    def seed_once(self) -> None:
        """Before the first batch: the model is made, alike everywhere; from here on ranks draw masks of their own."""
        if not self.is_seeded:
            seed_everything(derive_seed("rank", self._seed, self._world.rank))
            self.is_seeded = True

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks."""
        epochs = {number: loader.epoch for number, loader in self._loaders.items()}
        return {"epochs": epochs, "num_batches": self.num_batches, "is_seeded": self.is_seeded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.num_batches, self.is_seeded = state["num_batches"], state["is_seeded"]
        for number, loader in self._loaders.items():
            loader.epoch = state["epochs"].get(number, 0)

    def own_state(self) -> dict[str, Any]:
        """What each rank has to itself."""
        return {
            "rng": rng_state(self._world.device),
            "loaders": {number: loader.batches.state_dict() for number, loader in self._loaders.items()},
            "metrics": {number: metric.state_dict() for number, metric in self._metrics.items()},
            "logged": self.logged.state_dict(),
        }

    def load_own(self, ranks: Mapping[int, Mapping[str, Any]], saved_size: int, step: int) -> None:
        """Become what `own_state` gave: to the bit on as many ranks. No collective.

        Args:
            ranks: the states of all ranks, or, at the same number of them, this rank's.
            saved_size: how many there were.
        """
        rank = self._world.rank
        for number, state in ranks[rank % saved_size]["loaders"].items():
            if (loader := self._loaders.get(number)) is not None:
                loader.batches.load_state_dict(state)
        if saved_size == self._world.world_size:
            own = ranks[rank]
            set_rng_state(own["rng"], self._world.device)
            self.logged.load_state_dict(own["logged"])
            for number, metric in self._metrics.items():
                if number in own["metrics"]:
                    metric.load_state_dict(own["metrics"][number])
            return
        seed_everything(derive_seed("rank", self._seed, rank, step))
        states = list(ranks.values())
        self.logged.reset()
        if self._world.is_main:
            self.logged.load_merged([state["logged"] for state in states])
        for number, metric in self._metrics.items():
            metric.reset()
            if self._world.is_main and number in states[0]["metrics"]:
                metric.load_state_dict(metric.merge([state["metrics"][number] for state in states]))
