"""How long until N ranks have made their first DDP step: `dtrain launch` beside torchrun, the same script.

    python bench/first_step.py --ranks 4 --repeats 5

The two alternate, so that a busy machine slows both; medians and their ratio are printed. The script imports torch
and torchmetrics, joins a gloo group, and makes one optimizer step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """
import time
import torch
import torch.distributed as dist
import torchmetrics
from torch import nn

dist.init_process_group("gloo")
model = nn.parallel.DistributedDataParallel(nn.Linear(8, 2))
optimizer = torch.optim.Adam(model.parameters())
model(torch.randn(4, 8)).sum().backward()
optimizer.step()
if dist.get_rank() == 0:
    print("FIRST", time.time(), flush=True)
dist.destroy_process_group()
"""


def measure(command: list[str], folder: Path) -> tuple[float, float]:
    """Seconds to the first step, and of the whole command."""
    began = time.time()
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=300)
    ended = time.time()
    first = next(line.split()[1] for line in result.stdout.splitlines() if line.startswith("FIRST"))
    return float(first) - began, ended - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    bin_folder = Path(sys.executable).parent
    ranks = str(arguments.ranks)
    commands = {
        "torchrun": [str(bin_folder / "torchrun"), "--standalone", "--nproc-per-node", ranks, "first_step.py"],
        "dtrain": [str(bin_folder / "dtrain"), "launch", "--gpus", ranks, "first_step.py"],
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "first_step.py").write_text(SCRIPT)
        for _ in range(arguments.repeats):
            for name, command in commands.items():
                seconds[name].append(measure(command, folder))
    print(f"{ranks} ranks, {os.cpu_count()} cores, median of {arguments.repeats}, alternating")
    medians = {name: [statistics.median(times) for times in zip(*rows, strict=True)] for name, rows in seconds.items()}
    for name, (first, whole) in medians.items():
        print(f"{name:9} first step {first:6.2f} s   whole command {whole:6.2f} s")
    ratios = [peer / ours for peer, ours in zip(medians["torchrun"], medians["dtrain"], strict=True)]
    print(f"torchrun / dtrain: first step {ratios[0]:.2f}, whole command {ratios[1]:.2f}")


if __name__ == "__main__":
    main()
