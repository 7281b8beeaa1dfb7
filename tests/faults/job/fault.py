"""One launch's fault, and the record of what its ranks did. Used by the job's processes and by the harness.

They share the launch's folder, which LAUNCH names:

    fault.json               the fault, if this launch has one
    agent.pid, rank-K.pid    the process that the harness started, and the ranks
    armed                    the step has come from which on the fault strikes, at its moment
    struck.json              it struck; written before the signal, since the process may be its own victim
    rank-K.jsonl             each forward pass: [in training, optimizer steps done, [[index, draws...], ...]]
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCH = "DTRAIN_FAULTS_LAUNCH"
FEATURES, DRAWN, WIDTH = 6, 3, 256
SAMPLES, VAL_SAMPLES, EPOCHS, EPOCH_STEPS = 100, 35, 3, 8  # of job.yaml
LAST_STEP = EPOCHS * EPOCH_STEPS
GIVE_UP_S, TO_BE_HEARD_S = 60.0, 1.0


@dataclass(frozen=True)
class Fault:
    """A signal to some of a run's processes, at a moment.

    Attributes:
        moment: start, load, forward, backward, checkpoint, validation or time. The harness sees to the first, to a
            checkpoint and to a random time; the others are found by the code of rank `at` itself.
        victim: rank, ranks, agent, loader (the loading process that finds the moment), or group: the agent's process
            group, as a cluster signals it.
        signal: its number.
        rank: which one, where the victim is a rank.
        step: the moment is one after which this many optimizer steps are done.
        skip: how many such moments pass before.
        delay_s: from the moment to the signal.
    """

    moment: str
    victim: str
    signal: int
    rank: int = 0
    at: int = 0
    step: int = 0
    skip: int = 0
    delay_s: float = 0.0

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.victim == "rank" else self.victim
        return f"{signal.Signals(self.signal).name} to {who}, {self.moment}"


def strike(launch: Path, fault: Fault, **circumstances: Any) -> None:
    """Send the signal, if no other process of the launch has."""
    try:
        descriptor = os.open(launch / "struck.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(descriptor, json.dumps({"step": last_step(launch), **circumstances}).encode())
    try:
        for pid in victims(launch, fault):
            os.kill(pid, fault.signal)
    except ProcessLookupError:  # too late: it has ended by itself
        (launch / "struck.json").unlink()


def victims(launch: Path, fault: Fault) -> list[int]:
    """The pids to signal, this process last; minus the pid for a process group."""
    if fault.victim == "loader":
        return [os.getpid()]
    names = {"rank": f"rank-{fault.rank}.pid", "ranks": "rank-*.pid"}.get(fault.victim, "agent.pid")
    pids = [int(path.read_text()) for path in launch.glob(names)]
    return [-pids[0]] if fault.victim == "group" else sorted(pids, key=lambda pid: pid == os.getpid())


def last_step(launch: Path) -> int | None:
    """Optimizer steps done at the launch's last forward pass; None before the first."""
    record = launch / "rank-0.jsonl"
    lines = record.read_text().splitlines() if record.exists() else []
    return json.loads(lines[-1])[1] if lines else None


# -- in the job's processes ----------------------------------------------------------------------

HERE = Path(os.environ.get(LAUNCH, "."))
RANK = int(os.environ.get("RANK", "-1"))
FAULT = Fault(**json.loads((HERE / "fault.json").read_text())) if (HERE / "fault.json").exists() else None
passed = 0  # moments that were those of the fault


def announce_rank() -> None:
    temporary = HERE / f".rank-{RANK}.pid"
    temporary.write_text(str(os.getpid()))
    temporary.rename(HERE / f"rank-{RANK}.pid")


def forward_pass(training: bool, steps_done: int, samples: list[list[float]]) -> None:
    """Note it down, and see whether the fault is due."""
    with (HERE / f"rank-{RANK}.jsonl").open("a") as file:
        file.write(json.dumps([training, steps_done, samples]) + "\n")
    if FAULT is None:
        return
    if training and FAULT.at == RANK and steps_done >= FAULT.step:
        (HERE / "armed").touch()
    if steps_done == LAST_STEP:
        await_strike()
    moment("forward" if training else "validation")


def moment(name: str) -> None:
    """This process is at a moment of that name: strike if it is the fault's."""
    global passed
    if FAULT is None or (name, RANK) != (FAULT.moment, FAULT.at) or not (HERE / "armed").exists():
        return
    passed += 1
    if passed > FAULT.skip and not (HERE / "struck.json").exists():
        time.sleep(FAULT.delay_s)
        strike(HERE, FAULT)


def await_strike() -> None:
    """Before the run's last validation: its fault strikes at a random time, and the agent hears it, before the end."""
    struck, began = HERE / "struck.json", time.time()
    while FAULT.moment == "time" and not struck.exists() and time.time() < began + GIVE_UP_S:
        time.sleep(0.01)
    if FAULT.signal == signal.SIGTERM and struck.exists():
        time.sleep(max(0.0, struck.stat().st_mtime + TO_BE_HEARD_S - time.time()))
