"""One history, proved by force: runs are killed and stopped at random moments, and continue to the same bits.

    python tests/faults/campaign.py --trials 100 --seed 0

Each trial trains tests/faults/job on 2 or 3 processes, strikes it one to three times (see Fault), continues it after
each, and compares weights, metrics and the samples of each step with the run that nothing interrupted. Exit code 1 if
any trial is not clean; its folder is kept.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from command import make_store
from faults.history import History
from faults.trial import MOMENTS, PROBLEMS, Config, Result, draw, run_trial, uninterrupted


class Campaign:
    """Runs trials under a folder, with one MLflow store, and each uninterrupted run made once."""

    def __init__(self, seed: int, folder: Path, store: str) -> None:
        self.seed, self.folder, self.store = seed, folder, store
        self._histories: dict[Config, History] = {}
        self._lock = threading.Lock()

    def run(self, number: int) -> Result:
        """The trial of that number; a clean one's folder is removed."""
        began = time.monotonic()
        trial = draw(self.seed, number)
        folder = self.folder / f"trial-{number}"
        folder.mkdir()
        result = run_trial(trial, folder, self.store, self.expected(trial.config))
        kept = "" if result.clean else f" | {folder}"
        print(f"{number:4} {time.monotonic() - began:4.0f} s  {trial.config} | {result}{kept}", flush=True)
        if result.clean:
            shutil.rmtree(folder)
        return result

    def expected(self, config: Config) -> History:
        """The history of that configuration, which does not depend on how often checkpoints are saved."""
        config = replace(config, every="epoch")
        with self._lock:
            if config not in self._histories:
                folder = self.folder / f"uninterrupted-{len(self._histories) + 1}"
                folder.mkdir()
                self._histories[config] = uninterrupted(config, folder, self.store)
            return self._histories[config]


def summary(results: list[Result]) -> str:
    """What all trials together show: what was found, and what was struck where."""
    identical = sum(not result.problems["different"] and not result.problems["unusable"] for result in results)
    lines = [f"{len(results)} trials, {sum(result.clean for result in results)} clean, {identical} bit-identical"]
    for name, what in PROBLEMS.items():
        lines.append(f"{sum(len(result.problems[name]) for result in results):6} {name} ({what})")
    struck = [(fault, noted) for result in results for fault, noted in result.struck]
    lines += table(Counter((f"{signal.Signals(f.signal).name} {f.victim}", f.moment) for f, _ in struck))
    midway = sum(noted.get("midway", False) for fault, noted in struck if fault.moment == "checkpoint")
    return "\n".join([*lines, f"{midway} of those at a checkpoint while it was half written"])


def table(counts: Counter[tuple[str, str]]) -> Iterable[str]:
    yield f"{'struck':16}" + "".join(f"{moment:>11}" for moment in MOMENTS) + f"{'all':>7}"
    for target in [*sorted({target for target, _ in counts}), "all"]:
        row = [sum(n for (t, m), n in counts.items() if target in (t, "all") and m == moment) for moment in MOMENTS]
        yield f"{target:16}" + "".join(f"{n:11}" for n in row) + f"{sum(row):7}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="which trials")
    parser.add_argument("--only", type=int, nargs="+", help="just the trials of these numbers, from 0")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--keep-failures", type=Path, help="where failed trials stay; default: a new folder")
    options = parser.parse_args()
    folder = (options.keep_failures or Path(tempfile.mkdtemp(prefix="dtrain-faults-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(options.seed, folder, make_store(folder))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(campaign.run, options.only or range(options.trials)))
    print(summary(results))
    clean = all(result.clean for result in results)
    if clean:
        shutil.rmtree(folder)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
