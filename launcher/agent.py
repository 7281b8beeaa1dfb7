"""The node agent: starts this node's ranks on torch's elastic agent, passes on requests to stop, reports the end."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from dtrain.heartbeat import Heartbeat
from dtrain.keeper import Keeper
from dtrain.run import RunDir

from . import causes, entry

EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


def start_fork_server(preload: Sequence[str]) -> None:
    """Start the process that all ranks are forked from, so that it imports while this one goes on.

    From the main thread, and before this process imports torch. Only modules that leave CUDA alone may be
    preloaded: once CUDA is initialised, no forked process can use it.
    """
    multiprocessing.set_forkserver_preload(["dtrain.launcher.preload", *preload])
    multiprocessing.forkserver.ensure_running()


def run_ranks(task: entry.Task, num_ranks: int, run: RunDir, *, quiet: bool = False) -> int:
    """Run the task on this node's ranks to the end; the exit code. The run must be locked by the caller.

    With `quiet` nothing but a failure is shown, and MLflow gets nothing.
    """
    heartbeats = [Heartbeat(run.heartbeat(rank), create=True) for rank in range(num_ranks)]
    for rank in range(num_ranks):
        run.rank_error(rank).unlink(missing_ok=True)  # of an earlier start
    echo = sys.stdout if task.script else sys.stderr
    with Keeper(run, None if quiet else echo, quiet=quiet) as keeper:
        requests = StopRequests(heartbeats, lambda: task.script is None or keeper.has_begun)
        return _run_ranks(task, num_ranks, run, requests, keeper)


def _run_ranks(task: entry.Task, num_ranks: int, run: RunDir, requests: StopRequests, keeper: Keeper) -> int:
    with tempfile.TemporaryDirectory(prefix="dtrain-") as scratch, agent_log(run):
        try:
            with requests.handled():  # from here on: importing torch's agent can take seconds
                requests.agent = agent = _elastic_agent(task, num_ranks, scratch)
                result = agent.run()
        except KeyboardInterrupt:
            keeper.finish("killed", EXIT_INTERRUPTED)
            keeper.screen.print("interrupted; nothing was saved after the last checkpoint")
            return EXIT_INTERRUPTED
        return _finish(agent, result, requests, run, keeper)


def _elastic_agent(task: entry.Task, num_ranks: int, scratch: str) -> Any:
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

    # Port 0: the kernel picks a free one, and the ranks use the agent's own store, so that no port can be lost.
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0",
        run_id=os.path.basename(scratch),
        min_nodes=1,
        max_nodes=1,
        local_addr="localhost",
        is_host=True,
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=num_ranks,
        entrypoint=entry.run,
        args=(task,),
        rdzv_handler=registry.get_rendezvous_handler(parameters),
        max_restarts=0,
        monitor_interval=0.1,
        local_addr="localhost",
    )
    # Its own handlers would kill at once, where ours ask for a checkpoint first. It wants at least one signal: one
    # that nobody sends.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGURG"
    return LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=scratch), start_method="forkserver", shutdown_timeout=10)


class StopRequests:
    """What signals to the agent mean: the first asks the ranks to stop at a step boundary, Ctrl-C again ends all."""

    def __init__(self, heartbeats: Sequence[Heartbeat], listens: Callable[[], bool]) -> None:
        self.first: int | None = None
        self.agent: Any = None  # torch's, once it is made
        self._heartbeats = heartbeats
        # Whether the ranks look at the request: a job's do from the start, a script's once its Trainer runs.
        self._listens = listens

    @contextmanager
    def handled(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)
        previous = {number: signal.signal(number, self._handle) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.first is None:
            self.first = number
            for heartbeat in self._heartbeats:
                heartbeat.stop = number
            again = "; again to end at once" if number == signal.SIGINT else ""
            if self._listens():
                _say(f"{name}: stopping at the next step, with a checkpoint{again}")
                return
        elif number != signal.SIGINT:
            return
        self._kill_ranks()
        raise KeyboardInterrupt

    def _kill_ranks(self) -> None:
        context = None if self.agent is None else self.agent._pcontext
        for pid in context.pids().values() if context is not None else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _say(line: str) -> None:
    # Straight to the descriptor: a handler may have interrupted a print to the same stream.
    os.write(2, f"{line}\n".encode())


def _finish(agent: Any, result: Any, requests: StopRequests, run: RunDir, keeper: Keeper) -> int:
    if not result.is_failed():
        if EXIT_STOPPED in result.return_values.values():
            code = EXIT_INTERRUPTED if requests.first == signal.SIGINT else EXIT_STOPPED
            keeper.finish("stopped", code)
            return code
        keeper.finish("finished", 0)
        found = "weights/best.pt and all else" if run.best_weights.exists() else "logs"  # a script may train by itself
        keeper.screen.print(f"finished; {found} in {run}; to compare runs: dtrain ui")
        return 0
    processes = agent._pcontext._pc.processes
    noticed = min(result.failures, default=None)
    ends = causes.read_ends(run, {rank: process.exitcode for rank, process in enumerate(processes)})
    cause = causes.first_cause(ends, noticed)
    error, code = causes.describe(cause), causes.exit_code(cause)
    keeper.finish("failed", code, error)
    print(causes.headline(error, run), file=sys.stderr)
    return code


@contextmanager
def agent_log(run: RunDir) -> Iterator[None]:
    """What torch's elastic agent has to say goes to the agent's log: the screen is for the cause."""
    import torch  # noqa: F401  # gives its loggers handlers of their own, those replaced here

    handler = logging.FileHandler(run.agent_log(0))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("torch", "torch.distributed")]
    kept = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, kept, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
