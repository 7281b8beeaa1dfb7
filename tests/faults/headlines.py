"""One rank breaks: the screen must name it and why, and nothing may be left running.

    python tests/faults/headlines.py --trials 200 --seed 0

Each trial breaks one rank of 2 or 3, in one of 8 ways, at a random moment. Exit code 1 if any headline is wrong or a
process stayed; the screens of such trials are printed. How long the job took to be down is printed too.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from command import Project, make_store
from faults.broken.broken import EPOCH_STEPS, EPOCHS, KINDS, MOMENTS

SAYS = {kind.__name__: says for kind, says in KINDS.items()}


@dataclass(frozen=True)
class Trial:
    """Which rank breaks how, and when."""

    ranks: int
    rank: int
    kind: str
    moment: str
    skip: int

    def job(self) -> dict[str, Any]:
        fault = {"kind": self.kind, "moment": self.moment, "rank": self.rank, "skip": self.skip}
        return {
            "name": "broken",
            "model": {"_target_": "broken.Net", **fault},
            "data": {
                "train": {"_target_": "broken.Points", "size": 8 * EPOCH_STEPS, **fault},
                "val": {"_target_": "broken.Points", "size": 12},
                "batch_size": 8,
            },
            "fit": {"epochs": EPOCHS},
        }


def draw(seed: int, number: int) -> Trial:
    """Trial `number` of the campaign `seed`: always the same one."""
    rng = random.Random(f"{seed}/{number}")
    ranks, moment = rng.choice((2, 3)), rng.choice(MOMENTS)
    longest = {"init": 1, "loading": 12, "validation": EPOCHS}.get(moment, EPOCHS * EPOCH_STEPS)
    return Trial(ranks, rng.randrange(ranks), rng.choice(list(SAYS)), moment, rng.randrange(longest))


def run_trial(trial: Trial, folder: Path, store: str) -> tuple[list[str], float]:
    """What was wrong, and for how long the job outlived the fault."""
    project = Project(folder, store)
    shutil.copyfile(Path(__file__).parent / "broken" / "broken.py", folder / "broken.py")
    project.job(**trial.job())
    with project.running("launch", "--gpus", str(trial.ranks), "--run-dir", "run", "job.yaml") as command:
        try:
            done = command.wait()  # for its end, and that of all its processes
        except AssertionError as error:
            return [str(error)], 0.0
    if not (folder / "struck").exists():
        return [f"the fault never struck:\n{done.err}"], 0.0
    wrong = []
    if done.code != 1:
        wrong.append(f"exit code {done.code}")
    headline = next((line for line in done.last_lines.splitlines() if line.startswith("rank ")), "")
    if not (headline.startswith(f"rank {trial.rank} failed: ") and SAYS[trial.kind] in headline):
        wrong.append(f"headline: {headline}\n{done.err}")
    down = next(line for line in project.run_dir().agent_log(0).read_text().splitlines() if "ranks are down" in line)
    when = datetime.strptime(" ".join(down.split()[:2]), "%Y-%m-%d %H:%M:%S,%f").timestamp()
    return wrong, when - float((folder / "struck").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="which trials")
    parser.add_argument("--only", type=int, nargs="+", help="just the trials of these numbers, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dtrain-faults-") as scratch:
        store = make_store(Path(scratch))

        def run(number: int) -> tuple[Trial, list[str], float]:
            trial, folder, began = draw(options.seed, number), Path(scratch) / f"trial-{number}", time.monotonic()
            folder.mkdir()
            wrong, outlived = run_trial(trial, folder, store)
            shutil.rmtree(folder)
            print(f"{number:4} {time.monotonic() - began:4.0f} s  {trial} {wrong or 'ok'} {outlived:.2f} s", flush=True)
            return trial, wrong, outlived

        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(run, options.only or range(options.trials)))
    bad = sum(bool(wrong) for _, wrong, _ in results)
    times = [outlived for _, _, outlived in results]
    print(f"{len(results)} faults, {len(results) - bad} named right, with nothing left running")
    print(f"down after {statistics.median(times):.2f} s (median), {max(times):.2f} s (longest)")
    print(
        *(f"{kind} {count}" for kind, count in sorted(Counter(trial.kind for trial, _, _ in results).items())), sep=", "
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
