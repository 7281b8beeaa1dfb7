"""Real processes for tests: `run_ranks(3, function, ...)` calls a function on each rank of a gloo group."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

# The fork server imports these once; after that a rank starts in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["preload"])

LATE_S = 100

_COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "reduce", "scatter", "send", "recv"),
)


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120) -> list[Any]:
    """What `function(rank, world_size, *args)` returned on each rank, in the order of the ranks.

    The first rank that raises ends the others and fails the caller with its traceback. So does a rank that
    dies, with its exit code, and `timeout` seconds without an end. No process is left behind.

    Args:
        function: of a module's top level, so that it pickles. Its results must pickle as well.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = pickle.dumps((function, args))
        ranks = [_start(rank, world_size, os.path.join(folder, "store"), work) for rank in range(world_size)]
        try:
            return _collect(ranks, time.monotonic() + timeout)
        finally:
            for _, process in ranks:
                process.kill()
                process.join()


@contextmanager
def count_collectives() -> Iterator[Counter[str]]:
    """Counts by name the collectives that this rank calls as `torch.distributed.name`."""
    counter: Counter[str] = Counter()
    with ExitStack() as stack:
        for name in _COLLECTIVES:  # as seen from outside: torch's own calls among them go another way
            stack.enter_context(patch.object(dist, name, _counted(getattr(dist, name), counter)))
        yield counter


def _counted(function: Callable[..., Any], counter: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counter[function.__name__] += 1
        return function(*args, **kwargs)

    return counted


def _start(rank: int, world_size: int, store: str, work: bytes) -> tuple[Connection, BaseProcess]:
    with patch.dict(os.environ, PYTHONPATH=os.path.dirname(__file__)):  # else it would not find what to import
        forkserver.ensure_running()
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_rank, args=(rank, world_size, store, work, theirs))
    process.start()
    theirs.close()
    return ours, process


def _collect(ranks: list[tuple[Connection, BaseProcess]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while waiting := {rank: pair for rank, pair in enumerate(ranks) if rank not in results}:
        connections = [connection for connection, _ in waiting.values()]
        ready = wait(connections, timeout=max(0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"no answer in time from ranks {sorted(waiting)}")
        for rank, (connection, process) in waiting.items():
            if connection in ready:
                results[rank] = _answer(rank, connection, process)
    return [results[rank] for rank in range(len(ranks))]


def _answer(rank: int, connection: Connection, process: BaseProcess) -> Any:
    try:
        error, result = pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionResetError):
        process.join()
        raise RuntimeError(f"rank {rank} ended with exit code {process.exitcode}") from None
    if error:
        raise RuntimeError(f"rank {rank} failed:\n{error}")
    return result


def _rank(rank: int, world_size: int, store: str, work: bytes, connection: Connection) -> None:
    faulthandler.dump_traceback_later(LATE_S)  # where it stands, if it does not end in time
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # loading processes start as they do elsewhere
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        # A file as the store: there is no port for two tests to fight over.
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        function, args = pickle.loads(work)
        # Pictures take four fifths of a small training; those of commands are drawn, and tested.
        with patch("dtrain.trainer.trainer.draw_fit"):
            answer = pickle.dumps((None, function(rank, world_size, *args)))
        dist.destroy_process_group()
    except BaseException:
        connection.send_bytes(pickle.dumps((traceback.format_exc(), None)))
        connection.poll(None)  # until killed: the others would otherwise report the lost connection first
        raise
    connection.send_bytes(answer)
