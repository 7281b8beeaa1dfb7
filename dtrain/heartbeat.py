"""A few bytes of shared memory for each rank, in the run folder: how far the rank is, and whether it shall stop.

A rank writes its place at each step (about a microsecond); its node's agent reads it, and writes the request to
stop. A file that both map, and not a message, so that neither ever waits for the other.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import astuple, dataclass
from pathlib import Path

_BEAT = struct.Struct("<6q2d")
_STOP = struct.Struct("<q")
_SIZE = _BEAT.size + _STOP.size


@dataclass(frozen=True)
class Beat:
    """Where a rank is. Counts are of this run, not of this process; 0 epochs mean that nothing has begun."""

    epoch: int = 0
    epochs: int = 0
    step: int = 0  # optimizer steps since the run began
    step_in_epoch: int = 0
    steps_in_epoch: int = 0  # 0 where it is not known
    validating: int = 0  # 1 during validation, where step_in_epoch counts validation batches
    samples: float = 0.0  # samples trained on by all ranks since this process began
    loss: float = float("nan")  # this rank's mean loss of the epoch so far


class Heartbeat:
    """One rank's bytes. `create` makes them anew (the agent, before the rank starts), else they are opened."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # cutting a file short under somebody's map would kill them
            path.write_bytes(_BEAT.pack(*astuple(Beat())) + _STOP.pack(0))
        descriptor = os.open(path, os.O_RDWR)
        try:
            self._bytes = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)

    def beat(self, beat: Beat) -> None:
        _BEAT.pack_into(self._bytes, 0, *astuple(beat))

    def read(self) -> Beat:
        return Beat(*_BEAT.unpack_from(self._bytes, 0))

    @property
    def stop(self) -> int:
        """The number of the signal that asked this rank to stop; 0 when none did."""
        return int(_STOP.unpack_from(self._bytes, _BEAT.size)[0])

    @stop.setter
    def stop(self, signal_number: int) -> None:
        _STOP.pack_into(self._bytes, _BEAT.size, signal_number)
