"""How long until N ranks have made their first step, and until the whole command is over: dtrain beside its peers.

    python bench/launch.py [--ranks 1 2 4 8] [--repeats 5] [--plot launch.png]

All run the same few lines: they import torch and torchmetrics, join a gloo group, and make one optimizer step of a
small model under DDP. torchrun, `accelerate launch` and `dtrain launch` get the same script; for Lightning's launcher
the lines are written with Fabric, which starts the ranks from within; a single bare `python` shows what one process
costs that nobody launches. (`accelerate launch` starts a single process without a group: it is measured from two on.)
`dtrain job` makes such a step as a job of one epoch, with validation, checkpoint and weights, and MLflow behind it;
`dtrain job, waiting` comes back when MLflow has it. They alternate, so that a busy machine slows all alike. Medians are
printed as a table, with what each takes as a multiple of dtrain's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dtrain.monitoring.mlflow_tracker import tracker
from dtrain.run.folder import RunDir

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

FABRIC_SCRIPT = """
import sys
import time
import torch
import torchmetrics
from lightning.fabric import Fabric
from torch import nn

fabric = Fabric(accelerator="cpu", devices=int(sys.argv[1]), strategy="ddp")
fabric.launch()
model = nn.Linear(8, 2)
model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters()))
fabric.backward(model(torch.randn(4, 8)).sum())
optimizer.step()
if fabric.global_rank == 0:
    print("FIRST", time.time(), flush=True)
"""

JOB = """
name: bench
model: {_target_: torch.nn.Linear, in_features: 8, out_features: 2}
data: {train: {_target_: parts.points}, val: {_target_: parts.points}, batch_size: 32}
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer: {_target_: parts.Adam}
metrics: {acc: {_target_: torchmetrics.Accuracy, task: multiclass, num_classes: 2}}
fit: {epochs: 1}
"""

JOB_PARTS = """
import os
import time
import torch
from torch.utils.data import TensorDataset

class Adam(torch.optim.Adam):
    def step(self, closure=None):
        super().step(closure)
        if os.environ["RANK"] == "0":
            print("FIRST", time.time(), flush=True)

def points():
    return TensorDataset(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2)
"""

BIN = Path(sys.executable).parent
DTRAIN = [str(BIN / "dtrain"), "launch", "--gpus"]
# By name: the command for so many ranks.
LAUNCHERS: dict[str, Callable[[int], list[str]]] = {
    "dtrain": lambda ranks: [*DTRAIN, str(ranks), "step.py"],
    "dtrain job": lambda ranks: [*DTRAIN, str(ranks), "--run-dir", "run", "job.yaml"],
    "dtrain job, waiting": lambda ranks: [*DTRAIN, str(ranks), "--run-dir", "run", "--wait-mlflow", "job.yaml"],
    "torchrun": lambda ranks: [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(ranks), "step.py"],
    "accelerate": lambda ranks: [
        # --multi_gpu only says how the ranks are started: with --cpu it starts one.
        *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--num_processes", str(ranks), "--num_cpu_threads_per_process", "1", "step.py"),
    ],
    "Lightning": lambda ranks: [sys.executable, "fabric.py", str(ranks)],
    "bare python": lambda ranks: [sys.executable, "step.py"],
}
SIZES = {"bare python": range(1, 2), "accelerate": range(2, 1000)}  # for one process, accelerate makes no group
BARE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}


class Crashed(Exception):
    """A command that did not end well, which peers do now and then (gloo's threads at a process's end)."""


def measure(name: str, ranks: int, folder: Path) -> tuple[float, float]:
    """Seconds to the first step, and of the whole command."""
    environment = {**os.environ, **(BARE if name == "bare python" else {})}
    began = time.time()
    command = LAUNCHERS[name](ranks)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    ended = time.time()
    printed = done.stdout + done.stderr
    firsts = [line.split()[-1] for line in printed.splitlines() if "FIRST" in line]
    if done.returncode or len(firsts) != 1:
        raise Crashed(f"{name} on {ranks} ranks: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    if (run := RunDir(folder / "run")).exists():
        while tracker.outstanding(run):  # what goes on behind the command must not slow the next one
            time.sleep(0.1)
        shutil.rmtree(run.path)
    return float(firsts[0]) - began, ended - began


def table(medians: dict[tuple[str, int], tuple[float, float]], ranks: list[int]) -> str:
    """Markdown: a line for each launcher and number of ranks, as multiples of the first launcher's, mostly dtrain's."""
    first_name = next(iter(medians))[0]
    of = f"of {first_name}'s"
    lines = [f"| ranks | launcher | first step | {of} | whole command | {of} |", "|--|--|--|--|--|--|"]
    for number in ranks:
        ours = medians[first_name, number]
        for (name, at), (first, whole) in medians.items():
            if at == number:
                ratios = first / ours[0], whole / ours[1]
                lines.append(
                    f"| {number} | {name} | {first:.2f} s | {ratios[0]:.2f} | {whole:.2f} s | {ratios[1]:.2f} |"
                )
    return "\n".join(lines)


def plot(medians: dict[tuple[str, int], tuple[float, float]], ranks: list[int], path: Path) -> None:
    """Seconds to the first step over the number of ranks, a line for each launcher."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in (name for name in LAUNCHERS if not name.startswith("dtrain job")):  # their first step is dtrain's
        numbers = [number for number in ranks if (name, number) in medians]
        seconds = [medians[name, number][0] for number in numbers]
        if numbers == [1]:
            axes.axhline(seconds[0], color="grey", linestyle=":", label=f"{name} (1 process)")
        else:
            axes.plot(numbers, seconds, marker="o", label=name)
    axes.set(xlabel="ranks", ylabel="seconds to the first step", xticks=ranks, ylim=(0, None))
    axes.set_title(f"{os.cpu_count()} cores")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=list(LAUNCHERS))
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    cases = [(name, n) for n in options.ranks for name in options.launchers if n in SIZES.get(name, range(1, 1000))]
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
    crashes: dict[tuple[str, int], int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "step.py").write_text(SCRIPT)
        (folder / "fabric.py").write_text(FABRIC_SCRIPT)
        (folder / "job.yaml").write_text(JOB)
        (folder / "parts.py").write_text(JOB_PARTS)
        if options.repeats > 1:  # fill the page cache
            for name in options.launchers:
                measure(name, min(n for each, n in cases if each == name), folder)
        for _ in range(options.repeats):
            for case in cases:
                try:
                    seconds[case].append(measure(*case, folder))
                except Crashed as error:
                    crashes[case] = crashes.get(case, 0) + 1
                    print(error, file=sys.stderr)
    medians = {
        case: (statistics.median(first for first, _ in rows), statistics.median(whole for _, whole in rows))
        for case, rows in seconds.items()
        if rows
    }
    print(f"{os.cpu_count()} cores, median of {options.repeats}, alternating\n\n{table(medians, options.ranks)}")
    for (name, ranks), count in crashes.items():
        print(f"\n{name} on {ranks} ranks crashed in {count} of {options.repeats}, which are not counted")
    if options.plot:
        plot(medians, options.ranks, options.plot)


if __name__ == "__main__":
    main()
