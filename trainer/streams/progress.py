"""How far the streams of a rank are in an epoch: what a checkpoint holds of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class StreamPosition(NamedTuple):
    """A stream's position in an epoch."""

    position: int = 0  # samples taken (of a user's own loader: batches)
    ended: bool = False
    # The states of the iterable and its iterator, where they have one; without, the stream is read again from its
    # start. Pickled, so that it stays what it was while the stream goes on.
    state: bytes | None = None


@dataclass
class StreamProgress:
    """How far a rank's streams are in an epoch, after the last batch that was requested."""

    epoch: int = 0
    splits: bool = False  # whether the stream splits itself
    # Of each loading process; of a plain stream: one.
    places: list[StreamPosition] = field(default_factory=lambda: [StreamPosition()])
    turn: int = 0  # the loading process that gives the next share, where the stream splits itself
    ended: bool = False  # on all ranks
