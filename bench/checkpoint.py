"""How long a checkpoint holds up the training: dtrain's beside a plain torch.save of the same state.

    python bench/checkpoint.py [--ranks 1] [--megabytes 400] [--repeats 5]

The state is a model's and its Adam's. torch.save is done by rank 0 while the others wait, as in most scripts, and no
fsync follows it. The two alternate; medians are printed. dtrain writes behind the training, which goes on meanwhile:
what its steps lose by that is measured too, against steps with nothing behind them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dtrain.files import write_text
from dtrain.run.folder import RunDir
from dtrain.schema.sections import Checkpoint
from dtrain.trainer.checkpoint.background import Background, Disk
from dtrain.trainer.checkpoint.manager import Checkpoints, Moment
from dtrain.trainer.checkpoint.optimizer_state import named_state
from dtrain.trainer.distributed.world import World, join_world

WIDTH = 2048
STEPS_ALONE = 5


class Training:
    """A stack of layers, with as many parameters as make a state of that size with Adam's two moments."""

    def __init__(self, megabytes: int) -> None:
        layers = round(megabytes * 1e6 / (3 * 4 * WIDTH**2))
        self.net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self.optimizer = torch.optim.Adam(self.net.parameters())
        self.step()
        self.bytes = 3 * sum(parameter.nbytes for parameter in self.net.parameters())

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.net(torch.randn(16, WIDTH)).square().mean().backward()
        self.optimizer.step()


def together(world: World, function: Callable[[], object]) -> float:
    """Seconds that the function takes on this rank, begun by all ranks at once."""
    world.barrier()
    return seconds(function)


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def plain(training: Training, world: World, folder: Path) -> float:
    """torch.save on rank 0."""

    def save() -> None:
        if world.is_main:
            state = {"model": training.net.state_dict(), "optimizer": training.optimizer.state_dict()}
            torch.save(state, folder / "plain.pt")
        world.barrier()

    return together(world, save)


class Ours:
    """Checkpoints as the training loop makes them."""

    def __init__(self, training: Training, world: World, folder: Path) -> None:
        run = RunDir(folder / "run")
        run.create()
        write_text(run.job, "name: bench\n")
        self._training, self._world = training, world
        self._checkpoints = Checkpoints(run, world, Checkpoint(keep=1), Disk(run))
        self._background = Background()

    def measure(self, number: int) -> tuple[float, float, float]:
        """Seconds that the call takes, that the writing takes, and that the steps made meanwhile lose."""
        alone = statistics.median(seconds(self._training.step) for _ in range(STEPS_ALONE))
        written = threading.Event()

        def save() -> None:
            net, optimizer = self._training.net, self._training.optimizer
            shared = {"model": net.state_dict(), "optimizer": named_state(optimizer, net)}
            write = self._checkpoints.snapshot(Moment(number), 0, shared, {})
            self._background.start([write, written.set])

        held_up = together(self._world, save)
        began, steps = time.perf_counter(), 0
        while not written.is_set():
            self._training.step()
            steps += 1
        took = time.perf_counter() - began
        self._background.wait()
        self._world.barrier()
        return held_up, took, took - steps * alone


def rank(arguments: argparse.Namespace) -> None:
    """Measure; rank 0 prints."""
    world = join_world("cpu")
    folder = Path(arguments.folder)
    training = Training(arguments.megabytes)
    ours = Ours(training, world, folder)
    plain(training, world, folder)
    first, *_ = ours.measure(0)
    rows = [(plain(training, world, folder), *ours.measure(i)) for i in range(1, arguments.repeats + 1)]
    if not world.is_main:
        return
    peer, held_up, took, lost = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"{world.world_size} ranks, {os.cpu_count()} cores, a state of {training.bytes / 1e6:.0f} MB, "
        f"median of {arguments.repeats}, alternating\n"
        f"torch.save           holds the training up for {peer:.3f} s\n"
        f"dtrain's checkpoint  holds the training up for {held_up:.3f} s: {held_up / peer:.3f} of that "
        f"(the first one, which imports DCP: {first:.3f} s)\n"
        f"                     is on disk, checksummed and synced, {took:.2f} s later; the steps made meanwhile lose "
        f"{lost:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=".", help="on the disk to measure")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        options = ["--megabytes", str(arguments.megabytes), "--repeats", str(arguments.repeats), "--folder", scratch]
        launch = [str(Path(sys.executable).with_name("dtrain")), "launch", "--gpus", str(arguments.ranks)]
        launch += ["--run-dir", f"{scratch}/launch"]
        subprocess.run([*launch, __file__, "--", *options], check=True)


if __name__ == "__main__":
    main()
