"""The node agent: starts this node's ranks, passes on requests to stop, reports the end."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtrain.monitoring.run_monitor import Keeper, RunState
from dtrain.monitoring.screen import values_line
from dtrain.run import node_disk
from dtrain.run.folder import EXIT_INTERRUPTED, EXIT_STOPPED, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.schema.packages import missing
from dtrain.stderr import say

from ..machine.scratch import held_folder
from ..rank import fork_server
from ..rank.entry import Task
from . import root_cause
from .stop_requests import StopRequests

if TYPE_CHECKING:
    from .nodes import Nodes
    from .supervisor import Supervisor


def run_ranks(
    task: Task,
    num_ranks: int,
    run: RunDir,
    show_ranks: Iterable[int] = (0,),
    nodes: Nodes | None = None,
    *,
    restarts: int = 0,
    quiet: bool = False,
    wait_mlflow: bool = False,
) -> int:
    """Run the task on this node's ranks to the end; the exit code. On node 0 the run must be locked by the caller.

    Args:
        show_ranks: whose output is shown, on node 0's screen.
        nodes: this node among several.
        restarts: how often the ranks are restarted after a failure, from the last checkpoint.
        quiet: nothing but a failure is shown, and MLflow gets nothing.
        wait_mlflow: whether to wait until MLflow has all of the run.
    """
    node_rank = 0 if nodes is None else nodes.node_rank
    ranks = range(node_rank * num_ranks, (node_rank + 1) * num_ranks)
    echo = sys.stderr if task.is_job else sys.stdout
    with ExitStack() as stack:
        stack.enter_context(node_disk.held(run.heartbeats))
        heartbeats = {rank: Heartbeat(run.heartbeat(rank), create=True) for rank in ranks}
        requests = StopRequests(heartbeats, is_job=task.is_job)
        keeper = None
        if node_rank == 0:  # it has rank 0, and keeps the run's status for all nodes
            keeper = stack.enter_context(
                Keeper(run, None if quiet else echo, show_ranks, quiet=quiet, wait_mlflow=wait_mlflow)
            )
        scratch = stack.enter_context(_scratch_folder())
        stack.enter_context(requests.handled())  # from here on: importing torch can take seconds
        try:
            with agent_log(run, node_rank):
                _prepare_torch(task, nodes)
                agent = _supervisor(task, run, nodes, scratch, restarts, requests, keeper, quiet=quiet)
                requests.agent = agent
                gc.freeze()  # imports are a million objects, none of them garbage
                gc.enable()
                agent.run()
        except KeyboardInterrupt:
            end = End("killed", EXIT_INTERRUPTED, "interrupted; nothing after the last checkpoint was saved")
        else:
            end = how_it_ended(agent.cause, requests, run)
        requests.are_over = True
        if nodes is not None:
            nodes.close()
        return end.report(keeper, is_raised=task.kind == "function")


@contextmanager
def _scratch_folder() -> Iterator[str]:
    """The log of torch's own agent."""
    with held_folder("scratch") as folder:
        try:
            yield str(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _prepare_torch(task: Task, nodes: Nodes | None) -> None:
    """What torch's agent and its ranks take from this process."""
    from .torch_elastic import start_ranks_by

    # Its own handlers would kill at once, where ours ask for a checkpoint first. It needs at least one signal: one
    # that nobody sends.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGURG"
    if nodes is not None:
        if nodes.interface is not None:  # otherwise gloo uses this host's name
            os.environ.setdefault("GLOO_SOCKET_IFNAME", nodes.interface)
    elif task.is_job:  # only gloo's ranks can connect, rather than anyone who reaches this host's address
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if task.forked:
        start_ranks_by(fork_server.fork_rank)


def _supervisor(
    task: Task,
    run: RunDir,
    nodes: Nodes | None,
    scratch: str,
    restarts: int,
    requests: StopRequests,
    keeper: Keeper | None,
    *,
    quiet: bool,
) -> Supervisor:
    from .node_store import Endpoint
    from .nodes import Nodes
    from .slow_start import Beginning
    from .supervisor import Restarts, Supervisor

    def report_restart(error: root_cause.Error) -> None:
        saved = ", from the last checkpoint" if task.is_job else ""  # how a script resumes is up to the script
        say(f"{root_cause.headline(error, run)}\nrestarting the ranks{saved}")
        if keeper is not None:
            keeper.restarted()

    return Supervisor(
        task,
        run,
        nodes or Nodes(Endpoint(), {}),
        requests.heartbeats,
        scratch,
        restarts=Restarts(restarts, report_restart),
        give_up=requests.is_overdue,
        beginning=Beginning(requests.heartbeats, say if not quiet else lambda line: None, is_job=task.is_job),
    )


@dataclass(frozen=True)
class End:
    """How a run ended, for status.json, the screen and the shell."""

    state: RunState
    exit_code: int
    line: str = ""
    error: root_cause.Error | None = None

    def report(self, keeper: Keeper | None, *, is_raised: bool) -> int:
        """Report it; the exit code.

        Args:
            is_raised: a failure is raised by the process that launched, which reads it in status.json.
        """
        if keeper is not None:
            keeper.finish(self.state, self.exit_code, None if self.error is None else root_cause.public(self.error))
            if self.state in ("finished", "killed") and self.line:
                keeper.screen.print(self.line)
        if (self.state == "failed" and not is_raised) or (keeper is None and self.line):
            say(self.line)
        return self.exit_code


def how_it_ended(cause: root_cause.Error | None, requests: StopRequests, run: RunDir) -> End:
    """How the run ended, judging by this node's ranks."""
    asked = requests.first
    if cause is None and requests.are_met:
        return End("stopped", EXIT_INTERRUPTED if asked == signal.SIGINT else EXIT_STOPPED)
    if asked not in (None, signal.SIGUSR2) and not requests.are_heard:
        return End("killed", 128 + asked, "ended on request")
    if cause is None:
        # A script may train by itself, and then there are logs alone.
        found = "weights/best.pt and everything else is" if run.best_weights.exists() else "logs are"
        tested = values_line(run.test_values())
        found = f"{tested}; {found}" if tested else found
        compare = "" if missing("mlflow") else "; to compare runs: dtrain ui"
        return End("finished", 0, f"finished: {found} in {run}{compare}")
    if cause["type"] == "Timeout":
        code = 1 if asked is None else 128 + asked  # None: another node got the request
        return End("killed", code, "the ranks did not stop when asked to, and were killed", cause)
    return End("failed", root_cause.exit_code(cause), root_cause.headline(cause, run), cause)


class _AgentLog(logging.FileHandler):
    """A full disk must not end the run, nor fill the screen."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def agent_log(run: RunDir, node_rank: int) -> Iterator[None]:
    """Send the logs of the supervisor and torch's elastic agent to the agent's log: the screen is for the cause."""
    import torch  # noqa: F401  # installs its loggers' handlers, which are replaced here

    handler = _AgentLog(run.agent_log(node_rank))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("torch", "torch.distributed", "dtrain")]
    kept = [(logger.handlers, logger.propagate) for logger in loggers]
    logging.getLogger("dtrain").setLevel(logging.INFO)
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, kept, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
