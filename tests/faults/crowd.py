"""Many launches at once on one machine: none may lose its ports, or anything else, to another.

    python tests/faults/crowd.py [--launches 50] [--ranks 2]

Each sums something over its ranks, which must be the sum over its own. Exit code 1 if one of them failed. A launch of 2
ranks takes 1 GB of memory, so there are fewer where there is less than that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from command import Done, Project

SCRIPT = """
import sys

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor(float(sys.argv[1]))
dist.all_reduce(total)
dist.barrier()
print(int(total))
dist.destroy_process_group()
"""


def launch_together(folder: Path, launches: int, ranks: int) -> list[Done]:
    """The ends of so many launches, all under way at the same time; number K prints K * ranks."""
    project = Project(folder, "sqlite:///unused.db")  # scripts have nothing for MLflow
    project.write("train.py", SCRIPT)
    with ExitStack() as stack:
        commands = [
            stack.enter_context(
                project.running(
                    "launch", "--gpus", str(ranks), "--run-dir", f"run-{number}", "train.py", "--", str(number)
                )
            )
            for number in range(launches)
        ]
        return [command.wait() for command in commands]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    fitting = int(memory_gb() / (0.6 + 0.2 * options.ranks))
    if options.launches > fitting:
        print(f"{memory_gb():.0f} GB of memory are free: {fitting} launches instead of {options.launches}", flush=True)
        options.launches = fitting
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dtrain-crowd-") as folder:
        ends = launch_together(Path(folder), options.launches, options.ranks)
    bad = [done for number, done in enumerate(ends) if not succeeded(done, number, options.ranks)]
    for done in bad:
        print(f"exit code {done.code}\n{done.out}{done.err}")
    seconds = time.monotonic() - began
    print(f"{len(ends) - len(bad)} of {len(ends)} launches of {options.ranks} ranks succeeded, in {seconds:.0f} s")
    return 1 if bad else 0


def memory_gb() -> float:
    """What is free, but for a tenth."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 0.9 * int(fields["MemAvailable"].split()[0]) / 2**20


def succeeded(done: Done, number: int, ranks: int) -> bool:
    """Whether launch `number` has computed what it should."""
    return done.code == 0 and done.out == f"[rank 0] {number * ranks}\n"


if __name__ == "__main__":
    sys.exit(main())
