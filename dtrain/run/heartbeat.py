"""A few bytes of shared memory per rank, outside the run folder: its progress, a request to stop, and the answer.

A rank writes its position at each step (about a microsecond); its node's agent reads it, and writes the request to
stop. A file that both map, and not a message, so that neither ever waits for the other.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

from dtrain.run import node_disk

HANG_TIMEOUT_VARIABLE = "DTRAIN_HANG_TIMEOUT_S"  # seconds without progress before a rank counts as hung
HANG_TIMEOUT_S = 1800.0

_BEAT = struct.Struct("<5q2d")
_MOVED = struct.Struct("<2qd")  # after the beat: phase, when it began, stop_s
_STOP = struct.Struct("<q")  # the request, and behind it the answer
_FIT = struct.Struct("<q")
_MOVED_AT, _STOP_AT = _BEAT.size, _BEAT.size + _MOVED.size
_STOPPED_AT = _STOP_AT + _STOP.size
_FIT_AT = _STOPPED_AT + _STOP.size
_SIZE = _FIT_AT + _FIT.size


class Phase(IntEnum):
    """What a rank is doing, in the order of these phases within one step."""

    STARTING = 0
    JOINING = 1  # the other ranks, which it waits for
    SAVING = 2
    LOADING = 3
    FORWARD = 4
    BACKWARD = 5  # with the exchange of gradients, and the optimizer's step
    WAITING = 6  # for the device to have done it
    VALIDATING = 7
    REPORTING = 8
    TESTING = 9  # the best weights, after the last step
    DONE = 10  # with training; what follows is up to the script


@dataclass(frozen=True)
class Beat:
    """A rank's position. Counts refer to this fit, not to this process; 0 epochs mean that nothing has begun."""

    epoch: int = 0
    epochs: int = 0
    step: int = 0  # optimizer steps since the run began
    step_in_epoch: int = 0  # of an evaluation: batches
    steps_in_epoch: int = 0  # 0 where it is not known
    samples: float = 0.0  # samples trained on by all ranks since this process began
    loss: float = float("nan")  # this rank's mean loss of the epoch so far
    phase: Phase = Phase.STARTING
    moved_ns: int = 0  # when it last moved, by time.monotonic_ns
    stop_s: float = 0.0  # how long a stop takes from here, as far as known: a step and a checkpoint
    fit: int = 0  # which one of the script

    @property
    def evaluating(self) -> str:
        """Which evaluation its batches are of; empty where it trains."""
        return {Phase.VALIDATING: "validation", Phase.TESTING: "test"}.get(self.phase, "")

    @property
    def has_joined(self) -> bool:
        """Whether it has met the other ranks, or tries to."""
        return self.phase != Phase.STARTING or self.fit > 0

    @property
    def in_fit(self) -> str:
        """Which fit it is, as a prefix for messages; empty for the first."""
        return f"fit {self.fit}, " if self.fit > 1 else ""


class Heartbeat:
    """One rank's bytes. `create` makes them (the agent, before the rank starts); otherwise they are opened."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if create:
            path = node_disk.make(path.parent) / path.name
            path.unlink(missing_ok=True)  # truncating a mapped file would kill its readers
            path.write_bytes(bytes(_SIZE))
        descriptor = os.open(path, os.O_RDWR)
        try:
            self._bytes = mmap.mmap(descriptor, _SIZE)
        finally:
            os.close(descriptor)

    def beat(self, beat: Beat) -> None:
        """This rank is there now."""
        numbers = (beat.epoch, beat.epochs, beat.step, beat.step_in_epoch, beat.steps_in_epoch)
        self._put(0, _BEAT.pack(*numbers, beat.samples, beat.loss))
        self._put(_MOVED_AT, _MOVED.pack(beat.phase, time.monotonic_ns(), beat.stop_s))

    def begin(self, fit: int) -> None:
        """The script's first, second or later fit begins; 0: the rank does."""
        self._put(_FIT_AT, _FIT.pack(fit))
        # A later fit counts as running training from the start: it handles a request to stop.
        self.beat(Beat(epochs=self.read().epochs if fit else 0))

    def enter(self, phase: Phase) -> None:
        """This rank enters another phase at the same position."""
        self._put(_MOVED_AT, struct.pack("<2q", phase, time.monotonic_ns()))

    def read(self) -> Beat:
        """The last beat."""
        phase, moved_ns, stop_s = _MOVED.unpack_from(self._bytes, _MOVED_AT)
        *counts, samples, loss = _BEAT.unpack_from(self._bytes, 0)
        (fit,) = _FIT.unpack_from(self._bytes, _FIT_AT)
        beat = replace(Beat(*counts), samples=samples, loss=loss, fit=fit)
        return replace(beat, phase=Phase(phase), moved_ns=moved_ns, stop_s=stop_s)

    @property
    def stop(self) -> int:
        """The number of the signal that asked this rank to stop; 0 when none did."""
        return int(_STOP.unpack_from(self._bytes, _STOP_AT)[0])

    @stop.setter
    def stop(self, signal_number: int) -> None:
        self._put(_STOP_AT, _STOP.pack(signal_number))

    @property
    def stopped(self) -> bool:
        """Whether this rank has stopped early, on request and with all that it needs to continue."""
        return bool(_STOP.unpack_from(self._bytes, _STOPPED_AT)[0])

    @stopped.setter
    def stopped(self, value: bool) -> None:
        self._put(_STOPPED_AT, _STOP.pack(value))

    def _put(self, place: int, numbers: bytes) -> None:
        """Overwrite in place. `pack_into` would write zeros first, which a reader might see.

        A rank interrupted at that moment would look as if it had been stuck since the machine booted.
        """
        self._bytes[place : place + len(numbers)] = numbers
