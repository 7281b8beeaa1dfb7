"""torch's elastic agent, with fast teardown and one agreed root cause when a rank, a node or the user ends the run.

It decides once per attempt, for all nodes, which rank is to blame, and takes all ranks down within about a
second. Imports torch.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

from dtrain.files import read_json
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Beat, Heartbeat
from dtrain.signals import held_back

from ..machine.proc import kill_sessions, oom_kills
from ..rank import flight_recorder
from ..rank.entry import Task
from . import root_cause
from .nodes import Nodes, Rendezvous
from .presence import Presence
from .slow_start import Beginning
from .torch_elastic import LocalAgent
from .watchdog import Watchdog

logger = logging.getLogger("dtrain.launcher")  # in the agent's log

_TERM_S = 1.0  # between the first signal and SIGKILL, for ranks of a failed job
_KILL_S = 5.0  # for the kernel to end them
_HEAR_S = 2.0  # for the other nodes to report how their ranks ended
_MONITOR_S = 0.1


@dataclass(frozen=True)
class Restarts:
    """How often ranks are restarted after a failure, and what is called with its cause each time."""

    most: int
    report: Callable[[dict[str, Any]], None]


class Supervisor(LocalAgent):
    """Starts this node's ranks, watches them, and restarts them if asked to.

    Args:
        task: what each rank runs.
        heartbeats: of this node's ranks, by rank.
        scratch: a folder for what torch's agent writes of its own.
        give_up: whether the ranks were asked to stop, and should have ended long ago.
        beginning: called at the start of each attempt.

    Attributes:
        cause: of the last attempt's failure, as status.json's `error`; None if it did not fail.
    """

    def __init__(
        self,
        task: Task,
        run: RunDir,
        nodes: Nodes,
        heartbeats: Mapping[int, Heartbeat],
        scratch: str,
        *,
        restarts: Restarts,
        give_up: Callable[[], bool],
        beginning: Beginning,
    ) -> None:
        spec = WorkerSpec(
            role="default",
            local_world_size=len(heartbeats),
            entrypoint=sys.executable,
            args=tuple(task.command()),
            rdzv_handler=Rendezvous(nodes, os.path.basename(scratch)),
            max_restarts=restarts.most,
            monitor_interval=_MONITOR_S,
            local_addr=nodes.host,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=scratch))
        self.cause: dict[str, Any] | None = None
        self._run = run
        self._nodes = nodes
        self._heartbeats = heartbeats
        self._watchdog = Watchdog(heartbeats, task.hang_timeout_s)
        self._beginning = beginning
        # What ends the ranks of an attempt that is lost; after a moment it is SIGKILL for all. A job's ranks leave
        # SIGTERM to the agent, and have nothing to put in order; a script may have a handler.
        self._end_by = signal.SIGKILL if task.is_job else signal.SIGTERM
        self._give_up = give_up
        self._restarts = restarts
        self._attempt = 0
        self._sent: dict[int, int] = {}  # by rank, the last signal that we sent
        self._folder = Presence(run.lock_file)
        # By rank, on this node's own disk, so that polling does not touch the run folder's file system.
        self._last_words = {rank: Path(os.path.realpath(run.last_word(rank))) for rank in heartbeats}
        self._ended_at: dict[int, float] = {}  # by rank, when it was seen to have ended
        self._logs = {rank: run.rank_log(rank) for rank in heartbeats}
        self._log_sizes: dict[int, int] = {}  # by rank, when the attempt began
        self._oom_kills = 0

    # -- called by torch's agent -----------------------------------------------------------------

    @contextmanager
    def starting(self) -> Iterator[None]:
        self._attempt += 1
        self._oom_kills = oom_kills()
        self.cause = None
        self._sent.clear()
        self._ended_at.clear()
        for rank, heartbeat in self._heartbeats.items():
            for file in (self._run.rank_error(rank), self._last_words[rank]):  # from an earlier start
                file.unlink(missing_ok=True)
            heartbeat.begin(0)
            log = self._run.rank_log(rank)
            self._log_sizes[rank] = log.stat().st_size if log.exists() else 0
        self._beginning.begin()
        with held_back():  # until the ranks have installed their handlers
            yield

    def monitor(self) -> RunResult:
        if self.cause is None:
            self._look()
        if self.cause is not None:
            return RunResult(state=WorkerState.FAILED)
        codes = self._exit_codes()
        is_done = all(code == 0 for code in codes.values())  # what has failed since that look, the next one sees
        return RunResult(WorkerState.SUCCEEDED if is_done else WorkerState.HEALTHY, return_values=codes)

    def restarting(self) -> None:
        assert self.cause is not None
        self._restarts.report(self.cause)

    def await_others(self) -> None:
        """This node is done; the others decide whether the run is."""
        self._nodes.report(self._attempt, {})
        while len(reports := self._reports()) < self._nodes.num_nodes - 1:
            if (lost := self._lost_node()) is not None:
                self.cause = lost
                return
            time.sleep(_MONITOR_S)
        self.cause = root_cause.first([report for report in reports.values() if report])

    # -- a failure -------------------------------------------------------------------------------

    def _look(self) -> None:
        """Check whether the attempt has failed, and if so, end it."""
        ends = self._ends()
        failed = [end for end in ends if end.has_failed]
        gone, elsewhere = self._lost_node(), self._reports()
        if failed:
            self._take_down()
            after = [end for end in self._ends() if end.has_failed and not self._ended_as_told(end)]
            for end in [*failed, *after]:
                logger.info("%s", end)
            found = root_cause.first_cause(failed, after)
            if self._folder.stays_away():
                self._conclude(root_cause.lost_folder(self._run))
            else:
                left = root_cause.left_early(found, ends, self._ended_at)
                self._conclude(left or root_cause.error_of(found, self._oom_kills, self._printed))
        elif unmet := root_cause.left_unmet(self._beats(), self._exit_codes(), self._ended_at):
            self._take_down()
            self._conclude(unmet)
        elif any(report.get("type") == "Hang" for report in elsewhere.values()) or self._watchdog.sees_hang():
            error = {**self._watchdog.explain(self.pids, self._logs), "host": socket.gethostname()}
            if records := flight_recorder.request(self._run, self._heartbeats):
                error["message"] += f"; the ranks' last collectives: {', '.join(map(str, records))}"
            self._take_down(at_once=True)
            self._conclude(error)
        elif any(elsewhere.values()):
            self._take_down()
            self._conclude({})
        elif gone is not None:
            self._take_down()
            self.cause = gone
        elif self._folder.is_gone():
            self._take_down(at_once=True)
            self._conclude(root_cause.lost_folder(self._run))
        elif self._give_up():
            self._take_down(at_once=True)
            self._conclude(root_cause.gave_up(min(self._heartbeats)))
        else:
            self._beginning.look(self.pids, self._logs)
        if self.cause is not None and self.cause["type"] in root_cause.FINAL:
            self.restart_no_more()

    def _conclude(self, own: dict[str, Any]) -> None:
        """Exchange with the other nodes how the ranks ended, and choose the root cause."""
        with suppress(DistNetworkError, DistStoreError):
            self._nodes.report(self._attempt, own)
        deadline = time.monotonic() + _HEAR_S
        while len(reports := self._reports()) < self._nodes.num_nodes - 1 and time.monotonic() < deadline:
            time.sleep(_MONITOR_S)
        self.cause = root_cause.first([report for report in (own, *reports.values()) if report])

    def _reports(self) -> dict[int, dict[str, Any]]:
        try:
            return self._nodes.reports(self._attempt)
        except (DistNetworkError, DistStoreError):
            return {}  # node 0 is gone, see `_lost_node`

    def _lost_node(self) -> dict[str, Any] | None:
        try:
            node = self._nodes.lost()
        except (DistNetworkError, DistStoreError):
            node = 0  # which keeps the store
        return None if node is None else root_cause.lost_node(node)

    def _take_down(self, *, at_once: bool = False) -> None:
        """End this node's ranks and everything that they have started."""
        if not at_once:
            self._signal(self._end_by, sparing_those_that_end=True)
            self._await_end(_TERM_S)
        self._signal(signal.SIGKILL)
        self._await_end(_KILL_S)
        kill_sessions(set(self.pids.values()))  # each rank has its own session, with what it has started
        for rank, words in self._last_words.items():  # to keep it as long as the run folder
            with suppress(OSError):
                shutil.copy(words, self._run.rank_error(rank))
        logger.info("this node's ranks are down")

    def _signal(self, number: int, *, sparing_those_that_end: bool = False) -> None:
        for rank, code in self._exit_codes().items():
            # A rank that has just reported an error is ending; its own exit code is worth a moment's wait.
            if code is not None or (sparing_those_that_end and self._is_ending(rank)):
                continue
            if not self._is_ending(rank):
                self._sent[rank] = number
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def _ended_as_told(self, end: root_cause.RankEnd) -> bool:
        """Whether the rank has ended because we told it to, and not for a reason of its own."""
        number = self._sent.get(end.rank)
        return number is not None and (end.exit_code == -number or end.suspicion > 1)

    def _is_ending(self, rank: int) -> bool:
        record = read_json(self._last_words[rank])
        return record is not None and not record["victim"]

    def _await_end(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while None in self._exit_codes().values() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _printed(self, rank: int) -> str:
        return root_cause.end_of_output(self._run.rank_log(rank), self._log_sizes[rank])

    def _ends(self) -> list[root_cause.RankEnd]:
        return root_cause.read_ends(self._last_words, self._exit_codes())

    def _beats(self) -> dict[int, Beat]:
        return {rank: heartbeat.read() for rank, heartbeat in self._heartbeats.items()}

    def _exit_codes(self) -> dict[int, int | None]:
        """By rank; None for those still running."""
        codes = self.poll()
        for rank, code in codes.items():
            if code is not None:
                self._ended_at.setdefault(rank, time.time())
        return codes
