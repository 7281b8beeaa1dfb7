"""What a training step costs beside a bare loop's, on one process and on several.

    python bench/step.py [--ranks 2] [--rounds 9] [--width 128]

An MLP, Adam, one Accuracy, batches ready in memory: all that is left is what the loop adds. With `--width 600` it has
400,000 parameters and a hidden layer more, and its own work is what counts. On several ranks the bare loop is DDP's.
Both sides alternate in the same processes; medians of the time between an epoch's optimizer steps.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Accuracy

from dtrain import Trainer

STEPS = 300
BATCH = 64  # on each rank
CLASSES = 10

Batch = tuple[Tensor, Tensor]


def ready(ranks: int) -> list[Batch]:
    """Batches that lie in memory, for all ranks together."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(STEPS, BATCH * ranks, 64, generator=generator)
    targets = torch.randint(CLASSES, (STEPS, BATCH * ranks), generator=generator)
    return list(zip(features, targets, strict=True))


def parts(width: int) -> tuple[nn.Module, torch.optim.Optimizer, Any, list[float]]:
    """A model, its optimizer, a metric, and the list to which each optimizer step adds its time."""
    torch.manual_seed(0)
    deeper = [nn.Linear(width, width), nn.ReLU()] if width > 128 else []
    net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), *deeper, nn.Linear(width, CLASSES))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    times: list[float] = []
    optimizer.register_step_post_hook(lambda *_: times.append(time.perf_counter()))
    return net, optimizer, Accuracy(task="multiclass", num_classes=CLASSES), times


def bare(data: list[Batch], folder: Path, width: int) -> list[float]:
    net, optimizer, metric, times = parts(width)
    if dist.is_initialized():
        data = [tuple(part.chunk(dist.get_world_size())[dist.get_rank()] for part in batch) for batch in data]
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    loss_fn = nn.CrossEntropyLoss()
    total = torch.zeros(())
    for features, target in data:
        optimizer.zero_grad()
        predictions = model(features)
        loss = loss_fn(predictions, target)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        metric.update(predictions.detach(), target)
    return times


def trainer(data: list[Batch], folder: Path, width: int) -> list[float]:
    net, optimizer, metric, times = parts(width)
    Trainer(net, nn.CrossEntropyLoss(), optimizer, {"acc": metric}, run_dir=folder, device="cpu").fit(data, epochs=1)
    return times


def measure(rounds: int, folder: Path, width: int) -> None:
    """Print the medians. All ranks take part; rank 0 prints."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    data = ready(ranks)
    ways: list[Callable[[list[Batch], Path, int], list[float]]] = [bare, trainer]
    gaps: dict[str, list[float]] = {way.__name__: [] for way in ways}
    for number in range(rounds + 1):  # the first warms up
        for way in ways:
            times = way(data, folder / f"{way.__name__}-{number}", width)
            if number:
                gaps[way.__name__].append(statistics.median(b - a for a, b in itertools.pairwise(times)))
    if rank == 0:
        medians = {name: statistics.median(each) for name, each in gaps.items()}
        shown = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in medians.items())
        print(f"{ranks} ranks: {shown} a step; ratio {medians['trainer'] / medians['bare']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--width", type=int, default=128, help="of the hidden layers")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["MLFLOW_TRACKING_URI"] = ""  # what sends a run would go on beside the next round
    if asked.folder is not None:
        dist.init_process_group("gloo")
        measure(asked.rounds, asked.folder, asked.width)
        dist.destroy_process_group()
        return
    with tempfile.TemporaryDirectory() as scratch:
        if asked.ranks == 1:
            measure(asked.rounds, Path(scratch), asked.width)
            return
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(asked.ranks)]
        rest = [__file__, "--folder", scratch, "--rounds", str(asked.rounds), "--width", str(asked.width)]
        subprocess.run([sys.executable, *torchrun, *rest], check=True)


if __name__ == "__main__":
    main()
