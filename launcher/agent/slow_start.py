"""Ranks that have not begun a while after their start: they may be slow or hung, and either is worth reporting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from dtrain.run.heartbeat import Beat, Heartbeat, Phase

from ..rank import stacks
from .awake_clock import AwakeClock
from .watchdog import DOING, laggard

FIRST_S = 60.0  # doubled after each report


class Beginning:
    """Reports which of this node's ranks have not begun, and where the one is that holds up the others.

    Args:
        heartbeats: by rank.
        is_job: whether all train; a script's rank is late if it has not joined the others, which wait for it.
    """

    def __init__(self, heartbeats: Mapping[int, Heartbeat], say: Callable[[str], None], *, is_job: bool) -> None:
        self._heartbeats = heartbeats
        self._say = say
        self._is_job = is_job
        self._clock = AwakeClock()
        self.begin()

    def begin(self) -> None:
        """The ranks are being started."""
        self._began = self._clock.now()
        self._due_s = FIRST_S

    def look(self, pids: Mapping[int, int], logs: Mapping[int, Path]) -> None:
        """Check now; call it continuously."""
        waited = self._clock.now() - self._began
        if waited < self._due_s:
            return
        self._due_s *= 2
        beats = {rank: heartbeat.read() for rank, heartbeat in self._heartbeats.items()}
        late = {rank: beat for rank, beat in beats.items() if not self._has_begun(beat)}
        if not late or not (self._is_job or any(beat.has_joined for beat in beats.values())):
            return
        found = {rank: stacks.request(pids[rank], logs[rank], goes_on=True) for rank in late}
        by_phase = {phase: [rank for rank in late if late[rank].phase == phase] for phase in Phase}
        doing = [f"rank {', '.join(map(str, ranks))}: {DOING[phase]}" for phase, ranks in by_phase.items() if ranks]
        first = laggard(late, found)
        where = f"; rank {first} stands here (all stacks are in {logs[first].parent}):\n{stacks.shown(found[first])}"
        self._say(
            f"no step has completed after {waited:.0f} s: {'; '.join(doing)}{where if found[first] else ''}".rstrip()
        )

    def _has_begun(self, beat: Beat) -> bool:
        if not self._is_job:
            return beat.has_joined
        return beat.samples > 0 or beat.phase >= Phase.VALIDATING
