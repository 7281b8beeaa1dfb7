"""A trial: a run that is struck by faults, each in a launch of its own, continued to its end, and compared."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from command import DTRAIN, RANK_VARIABLES, Command
from faults.history import History, differences, lost_and_repeated
from faults.job import fault as job
from faults.job.fault import EPOCH_STEPS, EPOCHS, LAST_STEP, Fault

from dtrain.run.folder import RunDir

JOB, LOOP = (Path(job.__file__).with_name(name) for name in ("job.yaml", "loop.py"))
VICTIMS = ("rank", "ranks", "agent", "group")
WEIGHTS = "first.pt"  # in a trial's folder, for what begins with it
TWO_OPTIMIZERS = (
    "optimizer={one: {_target_: torch.optim.SGD, params: rest.3.*, lr: 0.05, momentum: 0.9},"
    " rest: {_target_: net.Adam, lr: 0.02}}"
)
# The job as it stands, and before it: a part unfrozen in the second epoch; two optimizers, and a layer that each rank
# leaves out by chance; and counting in steps, with a loss for each of the two, values that are logged, weights to begin
# with, and a callback whose state decides what it does. Then a loop of its own, and one whose model is cut.
VARIANTS = (
    (JOB, ('fit.freeze={patterns: ["rest.0.*", "rest.3.*"], until: 11}',)),
    (JOB, ("fit.unused_parameters=allow", "model.drop=0.4", TWO_OPTIMIZERS)),
    (
        JOB,
        (
            *("fit.validate_every=5", "fit.report_every=3", "loss=null", "step={_target_: net.in_turn}"),
            TWO_OPTIMIZERS,
            f"init_from={{weights: {WEIGHTS}, strict: false}}",
            "callbacks=[{_target_: dtrain.WeightAveraging, start: epoch}, {_target_: net.Nudge, every: 5}]",
        ),
    ),
    (JOB, ()),
    (LOOP, ()),
    (LOOP, ("--strategy=fsdp",)),
)
MOMENTS = ("start", "load", "forward", "backward", "checkpoint", "validation", "time")


@dataclass(frozen=True)
class Config:
    """How the run is made; all but `every` decide its bits."""

    ranks: int
    workers: int
    micro_batch_size: int | None
    every: int | str = "epoch"
    program: Path = JOB
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = f"{self.ranks} ranks, {self.workers} workers, micro {self.micro_batch_size}, every {self.every}"
        return " ".join([f"{self.program.name}: {how}", *self.overrides])

    def arguments(self) -> list[str]:
        micro = self.micro_batch_size
        if self.program == JOB:
            micro = "null" if micro is None else micro
            settings = [
                f"data.workers={self.workers}",
                f"fit.micro_batch_size={micro}",
                f"checkpoint.every={self.every}",
            ]
        else:
            settings = ["--", f"--workers={self.workers}", f"--every={self.every}"]
            settings += [] if micro is None else [f"--micro-batch-size={micro}"]
        return ["--gpus", str(self.ranks), "--run-dir", "run", str(self.program), *settings, *self.overrides]


@dataclass(frozen=True)
class Trial:
    """What is done to a run."""

    config: Config
    faults: tuple[Fault, ...]


def draw(seed: int, number: int) -> Trial:
    """Trial `number` of the campaign `seed`: always the same one."""
    rng = random.Random(f"{seed}/{number}")
    drawn = rng.choice((2, 3)), rng.choice((0, 2)), rng.choice((None, 3)), rng.choice(("epoch", 3))
    config = Config(*drawn, *VARIANTS[number % len(VARIANTS)])
    # Each fault has an epoch of its own, so that the launch before leaves it something to strike.
    epochs = sorted(rng.sample(range(EPOCHS), rng.randint(1, EPOCHS)))
    return Trial(config, tuple(draw_fault(rng, config, epoch, epoch == epochs[-1]) for epoch in epochs))


def draw_fault(rng: random.Random, config: Config, epoch: int, is_last: bool) -> Fault:
    moment = rng.choice(MOMENTS if is_last else MOMENTS[:-1])  # after a random time, there may be nothing left to do
    victims = (*VICTIMS, "loader") if moment == "load" and config.workers else VICTIMS
    victim = rng.choice(victims)
    # To ranks and their loading processes SIGTERM says nothing: a cluster sends it to all, and means the agent.
    deadly = (signal.SIGKILL, signal.SIGTERM if victim == "agent" else signal.SIGABRT)
    number = signal.SIGTERM if victim == "group" else rng.choice(deadly)
    # Loading processes are up to 4 batches ahead: by the epoch's third step they still have something to load.
    steps = 3 if moment == "load" else EPOCH_STEPS - 2
    longest_s = {"start": 5.0, "time": 1.0}.get(moment, 0.025)
    return Fault(
        moment,
        victim,
        number,
        rank=rng.randrange(config.ranks),
        at=rng.randrange(config.ranks),
        step=0 if moment == "start" else epoch * EPOCH_STEPS + rng.randrange(steps),
        skip=rng.randrange(3) if moment in ("load", "forward", "backward", "validation") else 0,
        delay_s=rng.uniform(0.0, longest_s),
    )


PROBLEMS = {
    "different": "weights, rows of metrics.jsonl, and passes of other samples or other draws",
    "lost": "samples",
    "repeated": "samples",
    "orphans": "launches that left processes, or did not end",
    "unusable": "checkpoints that the run did not continue from",
    "wrong": "exit codes and states that are not the contract's",
    "missed": "faults that never struck",
}


@dataclass
class Result:
    """What came of a trial: the faults that struck, each with what was noted of it, and all that is not right."""

    struck: list[tuple[Fault, dict[str, Any]]] = field(default_factory=list)
    resumes: int = 0
    problems: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in PROBLEMS})

    @property
    def clean(self) -> bool:
        return not any(self.problems.values())

    def __str__(self) -> str:
        faults = "; ".join(f"{fault} at step {noted['step']}" for fault, noted in self.struck)
        found = [
            f"{len(entries)} {name}: {'; '.join(entries[:3])}{' ...' if len(entries) > 3 else ''}"
            for name, entries in self.problems.items()
            if entries
        ]
        return f"{faults or 'nothing struck'} | {self.resumes} resumes | {' | '.join(found) or 'ok'}"


def uninterrupted(config: Config, folder: Path, store: str) -> History:
    """The history of a run that nothing interrupts."""
    code, problem = launch(config, None, folder, folder / "launch-1", store)
    assert (code, problem) == (0, None), f"exit code {code} without any fault: {folder}/launch-1/screen.txt"
    return History.read(RunDir(folder / "run"), [folder / "launch-1"])


def run_trial(trial: Trial, folder: Path, store: str, expected: History) -> Result:
    """Strike the run, continue it to its end, and compare."""
    run, result, launches = RunDir(folder / "run"), Result(), []
    problems = result.problems
    for fault in (*trial.faults, None):
        result.resumes = len(launches)
        launches.append(here := folder / f"launch-{len(launches) + 1}")
        code, problem = launch(trial.config, fault, folder, here, store)
        problems["orphans"] += [problem] if problem else []
        if fault and (here / "struck.json").exists():
            noted = json.loads((here / "struck.json").read_text())
            result.struck.append((fault, noted))
            problems["wrong"] += unexpected(fault, noted["step"], code, run)
            continue
        problems["missed"] += [str(fault)] if fault else []
        if code != 0:
            problems["unusable"].append(f"{here.name} ended with {code}")
            return result
    try:
        found = History.read(run, launches, resumes_validation=trial.config.program == LOOP)
        problems["different"] = differences(found, expected)
        problems["lost"], problems["repeated"] = lost_and_repeated(found)
    except Exception as error:  # whatever a missing or damaged file makes its reader raise
        problems["different"].append(f"unreadable: {error!r}")
    return result


def unexpected(fault: Fault, step: int | None, code: int | None, run: RunDir) -> list[str]:
    """What the contract does not say of a launch that was struck after `step` optimizer steps (None: before any)."""
    state, asked = run.status().get("state"), fault.signal == signal.SIGTERM
    if fault.victim not in ("agent", "group"):
        right = (code, state) == (1, "failed")
    elif asked and step is not None:
        right = (code, state) == (75, "stopped") and any(run.checkpoints.glob("step-*"))
    else:  # SIGTERM kills, too, as long as the agent has not begun to listen
        right = code == -fault.signal and state != "running"
        right |= asked and (code, state) == (75, "stopped")
    if step is not None and step >= LAST_STEP - 1:  # nothing may have been left to stop for, and its end be written
        right |= state == "finished" and code in (0, -fault.signal)
    return [] if right else [f"exit code {code}, state {state} after {fault}"]


def launch(config: Config, fault: Fault | None, folder: Path, here: Path, store: str) -> tuple[int | None, str | None]:
    """Start or continue the run, see to its fault, and wait for its end: the exit code, and what did not end."""
    here.mkdir()
    if fault is not None:
        (here / "fault.json").write_text(json.dumps(asdict(fault)))
    environment = {key: value for key, value in os.environ.items() if key not in RANK_VARIABLES}
    environment |= {"MLFLOW_TRACKING_URI": store, job.LAUNCH: str(here)}
    resume = ["--resume"] if (folder / "run").exists() else []
    torch.save({"first.bias": torch.linspace(-1, 1, job.WIDTH)}, folder / WEIGHTS)
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(fault, here, folder / "run" / "checkpoints", config.ranks, over))
    command = Command([DTRAIN, "launch", *resume, *config.arguments()], folder, environment)
    (here / "agent.pid").write_text(str(command.pid))
    watcher.start()
    try:
        code, problem = command.wait().code, None
    except (AssertionError, subprocess.TimeoutExpired) as error:
        code, problem = None, str(error).splitlines()[0]
    finally:
        over.set()
        watcher.join()
        (here / "screen.txt").write_text(command.err)
    return code, problem


def watch(fault: Fault | None, here: Path, checkpoints: Path, ranks: int, over: threading.Event) -> None:
    """Strike at the moments that only the harness sees, those of the run as a whole. In a thread, until `over`."""

    def until(condition: Callable[[], object]) -> None:
        while not condition() and not over.is_set():
            time.sleep(0.001)

    armed, began, left_over = here / "armed", time.monotonic(), entries(checkpoints)
    if fault is None or fault.moment not in ("start", "checkpoint", "time"):
        return
    if fault.moment == "start":
        until(lambda: armed.exists() or time.monotonic() > began + fault.delay_s)
        if fault.victim in ("rank", "ranks"):
            until(lambda: len(list(here.glob("rank-*.pid"))) == ranks)
    else:
        until(armed.exists)
        if fault.moment == "checkpoint":
            complete = {entry for entry in entries(checkpoints) if not entry[0].startswith(".")}
            until(lambda: entries(checkpoints) - left_over - complete)
        over.wait(fault.delay_s)
    if not over.is_set():
        midway = any(name.startswith(".") for name, _ in entries(checkpoints) - left_over)
        job.strike(here, fault, midway=midway)


def entries(checkpoints: Path) -> set[tuple[str, int]]:
    """What is there, each with its time: a half written checkpoint of an earlier launch may be made anew."""
    found = set()
    with contextlib.suppress(FileNotFoundError):
        for path in checkpoints.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_mtime_ns))
    return found
