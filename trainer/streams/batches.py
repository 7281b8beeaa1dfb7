"""Batches of shares that may end at any step: the ranks agree on each batch's samples, and on the end."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dtrain.errors import UserError

from ..data.batch_samples import num_samples, ways_to_take
from ..data.indexed import Batch, MicroBatch, num_kept
from ..data.transfer import to_device
from ..distributed.world import World
from .loading import Share
from .progress import StreamPosition, StreamProgress
from .shares import Shares

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Ahead:
    """What a rank has told the others about its next share."""

    share: Share
    kept: list[int | None]  # of each micro-batch, see `num_kept`
    filler: Any  # of what this rank has, for micro-batches without samples; None where it has nothing
    progress: StreamProgress  # with it
    found: Callable[[], Numbers]  # waits for what all ranks have told, a row of each


class StreamBatches:
    """The batches of shares that may end at any step, on one rank earlier than on another.

    For each step the ranks tell each other how many samples they have, so that the loss is divided by the whole batch,
    and the epoch ends for all when none has any. They do so a step ahead, so that nobody waits for the numbers. A rank
    without samples while others have some computes a filler, of the same batch; see `IndexedBatches`.

    Args:
        fill_empty: whether an empty share is filled, where the model is called by all ranks together, or left out.
    """

    def __init__(self, shares: Shares, world: World, *, fill_empty: bool) -> None:
        self._shares = shares
        self._world = world
        self._fill_empty = fill_empty
        self._size = {"ranks": world.world_size, "workers": shares.workers}
        self._saved_size = self._size
        self._progress = StreamProgress()
        self._mark: int | None = None
        self.num_steps = shares.num_steps  # as of the epoch's beginning: a len() may be slow

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of the epoch, see `Batches`. All ranks take part, in an exchange of a few numbers each step.

        Raises:
            UserError: there is no sample; the ranks were given different samples of a plain stream; one that splits
                itself is to go on in mid-epoch with another number of ranks or loading processes.
        """
        self._begin(epoch, first_step)
        if self._progress.ended:
            return
        shares = self._own_shares()
        ahead = self._begin_agreement(*next(shares))
        for step in count(first_step):
            now, self._progress = ahead, ahead.progress
            samples, is_regular, filler = self._agree(now, epoch)
            if not samples:
                self._progress.ended = True
                if step == 0:
                    again = ": it must start over each time it is iterated" if epoch > 1 else ""
                    raise UserError(f"{self._shares.name} yields no samples in epoch {epoch}{again}")
                return
            ahead = self._begin_agreement(*next(shares))
            yield Batch(samples, self._micro_batches(now, samples, filler, is_regular=is_regular))

    def state_dict(self) -> dict[str, Any]:
        progress = self._progress
        places = [
            {**place._asdict(), "state": None if place.state is None else pickle.loads(place.state)}
            for place in progress.places
        ]
        return {
            "size": self._saved_size,
            "epoch": progress.epoch,
            "splits": progress.splits,
            "turn": progress.turn,
            "ended": progress.ended,
            "places": places,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved_size = state["size"]
        places = [
            StreamPosition(
                each["position"], each["ended"], None if each["state"] is None else pickle.dumps(each["state"])
            )
            for each in state["places"]
        ]
        self._progress = StreamProgress(state["epoch"], state["splits"], places, state["turn"], state["ended"])

    def _begin(self, epoch: int, first_step: int) -> None:
        self.num_steps = self._shares.num_steps
        if not first_step:
            self._progress = StreamProgress(epoch)
        elif self._progress.epoch != epoch:
            raise ValueError(f"epoch {epoch} can't continue at step {first_step} without its state")
        elif self._progress.splits and not self._progress.ended and self._saved_size != self._size:
            before = "{ranks} ranks and {workers} loading processes each".format(**self._saved_size)
            raise UserError(
                f"{self._shares.name} gives each process other samples, and the run was stopped within an epoch with "
                f"{before} (the rank itself counts as one): continue it with as many, here it would have "
                "{ranks} and {workers}".format(**self._size)
            )
        self._saved_size = self._size
        self._mark = None

    def _own_shares(self) -> Iterator[tuple[Share, StreamProgress]]:
        """This rank's shares, each with the progress that it makes. Loading processes without samples are passed over,
        until all are."""
        # The reader gets a copy: with no loading processes it is in this very process.
        progress = replace(self._progress, places=list(self._progress.places))
        for share in self._shares.read(replace(progress, places=list(progress.places))):
            if share.splits and not progress.splits:
                progress.splits, progress.places = True, [StreamPosition()] * self._shares.workers
            progress.places[share.worker if share.splits else 0] = share.place
            progress.turn = (share.worker + 1) % self._shares.workers if share.splits else 0
            if share.samples or not share.splits or all(place.ended for place in progress.places):
                yield share, replace(progress, places=list(progress.places))

    def _begin_agreement(self, share: Share, progress: StreamProgress) -> Ahead:
        """Tell the others what this rank has, and go on. All ranks take part."""
        parts, filler = share.micro_batches, share.filler
        kept = [asked if share.is_regular else num_kept(data, asked) for data, asked in parts]
        if filler is None:
            filler = next((data for (data, _), samples in zip(parts, kept, strict=True) if samples), None)
        needs_filler = self._fill_empty and filler is None and (not parts or None in kept)
        told = [share.samples, *share.whole, needs_filler, filler is not None, share.is_regular]
        return Ahead(share, kept, filler, progress, self._gather(told))

    def _agree(self, now: Ahead, epoch: int) -> tuple[int, bool, Any]:
        """Of what all have told, the batch's samples, and whether it is regular on all ranks; and this rank's filler.

        All take part in a broadcast if one needs a filler, and others have one.
        """
        of_ranks, whole, marks, needs, haves, regular = now.found().T
        alike = len(set(whole)) == len(set(marks)) == 1 and self._mark in (None, now.share.whole.mark)
        if not alike:
            raise UserError(
                f"{self._shares.name} does not give all processes the same samples in epoch {epoch}, and does not say "
                "that it splits itself. Either all get the same ones in the same order (random draws of torch, numpy "
                "and random are seeded alike), or it splits itself by get_worker_info().num_workers and .id"
            )
        self._mark = now.share.whole.mark
        samples = int(of_ranks.sum())
        filler = now.filler
        if samples and needs.any() and haves.any():
            filler = self._share_filler(filler, source=int(np.flatnonzero(haves)[0]))
        return samples, bool(regular.all()), filler

    def _gather(self, numbers: list[int]) -> Callable[[], Numbers]:
        """Begin to send all numbers to all ranks, which take part; the function waits for them, a row of each rank."""
        own = torch.tensor(numbers)
        rows = [torch.empty_like(own) for _ in range(self._world.world_size)]
        group = self._world.control
        if group is None:
            return lambda: own[None].numpy()
        work = dist.all_gather(rows, own, group=group, async_op=True)

        def end() -> Numbers:
            work.wait()
            return torch.stack(rows).numpy()

        return end

    def _share_filler(self, own: Any, source: int) -> Any:
        """This rank's own, or else two samples of the source rank's. All ranks take part."""
        box = [_two_samples(own) if self._world.rank == source else None]
        dist.broadcast_object_list(box, src=source, group=self._world.control)
        return box[0] if own is None else own

    def _micro_batches(self, now: Ahead, samples: int, filler: Any, *, is_regular: bool) -> Iterator[MicroBatch]:
        parts, kept = now.share.micro_batches, now.kept
        if not parts and self._fill_empty:
            parts = [(None, 0)] * self._shares.num_micro_batches
            kept = [None] * len(parts)
        for i, ((data, asked), found) in enumerate(zip(parts, kept, strict=True)):
            if found is None:
                data = filler if self._fill_empty else None
                if data is None:  # on all ranks alike, where it is filled
                    continue
            is_last, is_whole = i == len(parts) - 1, asked == samples
            data = to_device(data, self._world.device)
            yield MicroBatch(data, found or 0, samples, is_last, is_whole, is_regular)


def _two_samples(batch: Any) -> Any:
    """As much of a batch as a filler needs, since it is sent; the whole, where it can't be cut.

    Two, since batch norm refuses one.
    """
    samples = num_samples(batch) or 0
    ways = ways_to_take(batch, samples)
    return ways[0](range(min(2, samples))) if len(ways) == 1 else batch
