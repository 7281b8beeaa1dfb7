"""Finds ranks that hang: which one holds up the others, and where it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.run.heartbeat import Beat, Heartbeat, Phase

from ..machine.proc import children, is_suspended
from ..rank import stacks
from .awake_clock import AwakeClock

DOING = {
    Phase.STARTING: "starting",
    Phase.JOINING: "joining the other ranks",
    Phase.SAVING: "saving",
    Phase.LOADING: "loading data",
    Phase.FORWARD: "in its forward pass",
    Phase.BACKWARD: "in its backward pass or the exchange of gradients",
    Phase.WAITING: "waiting for its device. All ranks are, but only this one checks its own, so that the rank whose "
    "kernel or exchange hangs can't be told from here",
    Phase.VALIDATING: "validating",
    Phase.REPORTING: "exchanging metrics",
    Phase.TESTING: "evaluating the test set",
    Phase.DONE: "done",
}


class Watchdog:
    """Watches the heartbeats of this node's ranks.

    Args:
        heartbeats: by rank.
        timeout_s: seconds without progress before a rank that has begun counts as hung.
    """

    def __init__(self, heartbeats: Mapping[int, Heartbeat], timeout_s: float) -> None:
        self._heartbeats = heartbeats
        self._timeout_s = timeout_s
        self._clock = AwakeClock()
        self._seen: dict[
            int, tuple[int, float]
        ] = {}  # by rank: when it last made progress, by its clock, and when that was noticed

    def sees_hang(self) -> bool:
        """Whether a rank that has begun is hung."""
        now = self._clock.now()
        is_hung = False
        for rank, heartbeat in self._heartbeats.items():
            beat = heartbeat.read()
            if rank not in self._seen or beat.moved_ns != self._seen[rank][0]:
                self._seen[rank] = (beat.moved_ns, now)
            is_running = beat.epochs and beat.phase != Phase.DONE
            is_hung |= bool(is_running and now - self._seen[rank][1] > self._timeout_s)
        return is_hung

    def explain(self, pids: Mapping[int, int], logs: Mapping[int, Path]) -> dict[str, Any]:
        """Have all ranks write their stacks to their logs; the furthest behind, as status.json's `error`.

        `place` says how far it is, to be compared with other nodes' laggards.
        """
        beats = {rank: heartbeat.read() for rank, heartbeat in self._heartbeats.items()}
        found = {rank: stacks.request(pids[rank], logs[rank]) for rank in sorted(beats)}
        rank = laggard(beats, found)
        beat, pid, standing_in = beats[rank], pids[rank], found[rank]
        if beat.phase in (Phase.LOADING, Phase.VALIDATING, Phase.TESTING):  # it may be waiting for a loading process
            of_children = [stacks.request(child, logs[rank]) for child in children(pid)]
            standing_in = next((each for each in of_children if stacks.in_users_code(each)), standing_in)
        standing = (time.monotonic_ns() - beat.moved_ns) / 1e9 if beat.moved_ns else 0.0
        where = f"{beat.in_fit}epoch {beat.epoch}, after step {beat.step}" if beat.epochs else "before its first step"
        since = f"has made no progress for {standing:.0f} s" if beat.epochs else "has not started, while others have"
        suspended = "; the process is suspended (SIGSTOP)" if is_suspended(pid) else ""
        return {
            "rank": rank,
            "type": "Hang",
            "message": f"{since}: {DOING[beat.phase]}, {where}{suspended}",
            "traceback": stacks.shown(standing_in),
            "place": list(_place(beat)),
        }


def laggard(beats: Mapping[int, Beat], found: Mapping[int, list[stacks.Stack]]) -> int:
    """The rank that is furthest behind and, judging by its stacks, holds up the others."""
    furthest_behind = min(_place(beat) for beat in beats.values())
    laggards = [rank for rank, beat in beats.items() if _place(beat) == furthest_behind]
    # A rank that waits is in torch's code; the one that holds up the others is usually in the user's.
    return min(laggards, key=lambda rank: (not stacks.in_users_code(found[rank]), beats[rank].moved_ns))


def _place(beat: Beat) -> tuple[int, ...]:
    evaluated = beat.step_in_epoch if beat.evaluating else 0
    return (beat.fit, beat.epoch, beat.step, beat.phase, evaluated)
