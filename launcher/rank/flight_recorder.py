"""torch's record of a rank's last collectives, its flight recorder, written when the agent finds the ranks hung.

A thread of the rank waits for the request: who waits in a collective, or for a device, has let go of Python's lock.
https://docs.pytorch.org/tutorials/unstable/flight_recorder_tutorial.html
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

from dtrain.files import write_text
from dtrain.run.folder import RunDir

SIZE_VARIABLE = "TORCH_FR_BUFFER_SIZE"  # torch's: how many collectives are kept; 0 or unset: none
SIZE = 2000
_WRITTEN_S = 2.0  # for all ranks together
# By backend: the function of torch._C._distributed_c10d, which torch's own debug pages call too.
_DUMPS = {"nccl": "_dump_nccl_trace_json", "gloo": "_dump_fr_trace_json"}


def record(environment: MutableMapping[str, str]) -> None:
    """Have the ranks to come keep a record, unless the user has said something of it."""
    environment.setdefault(SIZE_VARIABLE, str(SIZE))


def is_recorded() -> bool:
    """Whether this rank keeps a record."""
    return os.environ.get(SIZE_VARIABLE, "0") != "0"


def answer_requests(run: RunDir, rank: int) -> None:
    """From now on, write the record when it is asked for."""
    pipe = run.record_request(rank)
    with contextlib.suppress(FileExistsError):  # of an attempt before
        os.mkfifo(pipe)
    args = (pipe, run.flight_record(rank))
    threading.Thread(target=_answer, args=args, name="dtrain-flight-recorder", daemon=True).start()


def _answer(pipe: Path, file: Path) -> None:
    while True:
        with pipe.open("rb") as requests:  # waits for the agent
            requests.read(1)
        with contextlib.suppress(OSError):  # a full disk
            write_text(file, json.dumps(dump(), indent=1))


def dump() -> dict[str, Any]:
    """What this process has recorded, by backend."""
    c10d: Any = sys.modules.get("torch._C._distributed_c10d")
    dumps = {backend: getattr(c10d, name, None) for backend, name in _DUMPS.items()}
    return {backend: json.loads(call()) for backend, call in dumps.items() if call is not None}


def request(run: RunDir, ranks: Iterable[int]) -> list[Path]:
    """Have these ranks of this node write their records; the files of those that did."""
    ranks = list(ranks)
    for rank in ranks:
        run.flight_record(rank).unlink(missing_ok=True)  # of an attempt before
    asked = [run.flight_record(rank) for rank in ranks if _ask(run.record_request(rank))]
    deadline = time.monotonic() + _WRITTEN_S
    while not all(file.exists() for file in asked) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [file for file in asked if file.exists()]


def _ask(pipe: Path) -> bool:
    try:
        descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # it keeps no record
        return False
    try:
        return os.write(descriptor, b"!") == 1
    except OSError:
        return False
    finally:
        os.close(descriptor)
