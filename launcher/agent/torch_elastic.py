"""torch's elastic agent as ours is derived from it: all of its private parts that are used, each with the reason.

torch documents that `LocalElasticAgent` is to be derived from, but the methods that a derived class fills in have
private names, and it has no public way to what it has started. tests/house/test_private_parts.py covers upgrades.
"""

from __future__ import annotations

import abc
import contextlib
import signal
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

_LEAVE_S = 2  # for what still runs when the agent leaves


class LocalAgent(LocalElasticAgent, abc.ABC):
    """torch's agent of one node, with names of ours for what it calls and what it has."""

    @abc.abstractmethod
    def starting(self) -> contextlib.AbstractContextManager[Any]:
        """Around the start of an attempt's ranks."""

    @abc.abstractmethod
    def monitor(self) -> RunResult:
        """Asked every `monitor_interval`: how the attempt is going."""

    @abc.abstractmethod
    def restarting(self) -> None:
        """The ranks of a failed attempt are about to be started again."""

    @abc.abstractmethod
    def await_others(self) -> None:
        """This node is done; to return ends it."""

    @property
    def workers(self) -> list[Worker]:
        """This node's ranks."""
        return self.get_worker_group().workers

    @property
    def pids(self) -> dict[int, int]:
        """The processes by rank; empty before they are started."""
        started = {} if self._pcontext is None else self._pcontext.pids()
        return {each.global_rank: started[each.local_rank] for each in self.workers if each.local_rank in started}

    def poll(self) -> dict[int, int | None]:
        """The exit codes by rank; None for those that run. torch's own look ends all where one has failed."""
        context: Any = self._pcontext
        polled = {local: handler.proc.poll() for local, handler in context.subprocess_handlers.items()}
        return {worker.global_rank: polled[worker.local_rank] for worker in self.workers}

    def restart_no_more(self) -> None:
        """Let the next failure be the last one, however many restarts were allowed."""
        self._remaining_restarts = 0

    # -- called by torch -------------------------------------------------------------------------

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with self.starting():
            started: dict[int, Any] = super()._start_workers(worker_group)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        return self.monitor()

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        self.restarting()
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, *args: Any, **kwargs: Any) -> None:
        # Each torch has other arguments here; 2.11 and older wait for half a minute, without being asked how long.
        if self._pcontext is not None:
            self._pcontext.close(death_sig, _LEAVE_S)
        super()._shutdown(death_sig, *args, **kwargs)

    def _exit_barrier(self) -> None:
        self.await_others()


def start_ranks_by(start: Callable[[tuple[str, ...], dict[str, str]], Any]) -> None:
    """From now on have the ranks' processes started by this function of a command and its environment.

    What it returns stands for a subprocess.Popen. torch's agent looks its handlers up in a module, and has no parameter
    for them.
    """

    class Handler(SubprocessHandler):
        def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
            return start(args, env)

        def close(self, death_sig: signal.Signals | None = None) -> None:
            with contextlib.suppress(ProcessLookupError):  # of another process's child no zombie is left to signal
                super().close(death_sig)

    api.get_subprocess_handler = Handler  # type: ignore[attr-defined, assignment]  # a function, imported there
