"""What a training step costs beside a bare loop's and the peers', on one process; beside DDP's on several.

    python bench/step.py [--ranks 2] [--rounds 15] [--steps 300] [--width 128] [--loops dtrain ignite]

An MLP, Adam, batches of 64 ready in memory, one accuracy and the mean loss: all that is left is what a loop adds. With
`--width 600` it has 400,000 parameters and a hidden layer more, and its own work is what counts. See loops.py for what
is compared. All of them take turns in the same process; shown are medians over the rounds, and quartiles, of the time
from one optimizer step to the next. On one process that is the CPU time of all its threads, to which what else the
machine does adds little, and none of the loops waits; on several it is the time that passes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from loops import CLASSES, OWN, PEERS, Batch, Loop, Parts
from torch import nn

LOOPS = OWN | PEERS
REFERENCE = "bare loop, torchmetrics' update"
BATCH = 64  # on each rank


def ready(ranks: int, steps: int) -> list[Batch]:
    """Batches that lie in memory, for all ranks together."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(steps, BATCH * ranks, 64, generator=generator)
    targets = torch.randint(CLASSES, (steps, BATCH * ranks), generator=generator)
    return list(zip(features, targets, strict=True))


def step_seconds(loop: Loop, batches: list[Batch], folder: Path, width: int) -> float:
    """Seconds a step, of those after an epoch's first tenth, in which there is much to be done once."""
    torch.manual_seed(0)
    deeper = [nn.Linear(width, width), nn.ReLU()] if width > 128 else []
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), *deeper, nn.Linear(width, CLASSES))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    times: list[float] = []
    clock = time.perf_counter if dist.is_initialized() else time.process_time
    optimizer.register_step_post_hook(lambda *_: times.append(clock()))
    # Lightning sets variables for the whole process when it is imported. By one of them torch looks for a driver at
    # each optimizer step of all, which takes 0.2 ms where there is none: nobody is measured so, Lightning neither.
    with contextlib.redirect_stdout(sys.stderr), patch.dict(os.environ):
        loop(Parts(net, optimizer, batches, folder))
    first = len(batches) // 10
    return (times[-1] - times[first]) / (len(times) - 1 - first)


def rounds(names: Sequence[str], number: int, batches: list[Batch], folder: Path, width: int) -> dict[str, list[float]]:
    """For each loop the seconds a step, round by round. All ranks take part."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(number + 1):  # the first warms up
        for name in list(seconds):
            try:
                taken = step_seconds(LOOPS[name], batches, folder / f"{name}-{i}", width)
            except ImportError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                del seconds[name]
                continue
            if i:
                seconds[name].append(taken)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """A line for each loop. Ratios are those within a round, since a load may come and go between rounds."""
    lines = ["| loop | us a step | quartiles | relative to the bare loop with the same metric |", "|--|--|--|--|"]
    for name, taken in seconds.items():
        low, median, high = quartiles([each * 1e6 for each in taken])
        line = f"| {name} | {median:.0f} | {low:.0f} to {high:.0f} |"
        if REFERENCE in seconds:
            ratios = [own / bare for own, bare in zip(taken, seconds[REFERENCE], strict=True)]
            line += " {1:.2f} ({0:.2f} to {2:.2f}) |".format(*quartiles(ratios))
        lines.append(line)
    return "\n".join(lines)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return low, median, high


def measure(asked: argparse.Namespace, folder: Path) -> None:
    """Print the table. All ranks take part; rank 0 prints."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    names = asked.loops or list(LOOPS if ranks == 1 else OWN)
    seconds = rounds(names, asked.rounds, ready(ranks, asked.steps), folder, asked.width)
    if ranks == 1 or dist.get_rank() == 0:
        conditions = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, a thread each, torch {torch.__version__}"
        print(f"{ranks} ranks, width {asked.width}, {asked.rounds} rounds; {conditions}\n\n{table(seconds)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=300, help="of an epoch, which is a round")
    parser.add_argument("--width", type=int, default=128, help="of the hidden layers")
    parser.add_argument("--loops", nargs="+", choices=list(LOOPS), metavar="LOOP", help=", ".join(LOOPS))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["MLFLOW_TRACKING_URI"] = ""  # what sends a run would go on beside the next round
    if asked.folder is not None:
        dist.init_process_group("gloo")
        measure(asked, asked.folder)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as scratch:
        if asked.ranks == 1:
            measure(asked, Path(scratch))
            return
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(asked.ranks)]
        subprocess.run([sys.executable, *torchrun, __file__, *sys.argv[1:], "--folder", scratch], check=True)


if __name__ == "__main__":
    main()
