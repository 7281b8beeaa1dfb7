"""Runs the checks, each in a process of its own with its own time limit, and writes the page of results."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import one  # noqa: F401  # registers all checks
from checks import CHECKS, HERE, Check
from command import processes

from dtrain.files import read_json

TOTAL_S = 525.0  # the rest of the 9 minutes is for the end
CPU_PATIENCE = 10  # a simulation measures nothing, and may be slow
MARK = "DTRAIN_GPU_CHECK"  # in the environment of all processes of one check

DESCRIBE = """
import json, torch
from dtrain.gpus import refusal
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
why = None if gpu else refusal()
print(json.dumps({"gpu": gpu, "why": why, "torch": torch.__version__, "CUDA": torch.version.cuda}))
"""


@dataclass(frozen=True)
class Result:
    """How a check ended: passed, failed or left out."""

    check: Check
    state: str
    figure: str
    seconds: float
    log: str = ""


class Suite:
    """Runs checks on a device, in folders of their own, until the time is up."""

    def __init__(self, device: str, folder: Path) -> None:
        self._device, self._folder = device, folder
        self._patience = 1 if device == "cuda" else CPU_PATIENCE
        self._deadline = time.monotonic() + self._patience * TOTAL_S

    def run(self, chosen: Sequence[Check], jobs: int) -> list[Result]:
        """Those that measure nothing side by side, the others alone; in the order of their numbers."""
        with ThreadPoolExecutor(jobs) as pool:
            results = list(pool.map(self._run_one, (each for each in chosen if not each.alone)))
        results += [self._run_one(each) for each in chosen if each.alone]
        return sorted(results, key=lambda result: result.check.number)

    def _run_one(self, check: Check) -> Result:
        began = time.monotonic()
        limit_s = min(self._patience * check.limit_s, self._deadline - began)
        if limit_s < 1:
            return self._told(Result(check, "left out", "the time was up", 0.0))
        folder = self._folder / f"{check.number:02}"
        folder.mkdir()
        log = self._folder / f"{check.number:02}.log"
        with log.open("wb") as output, _ended(uuid.uuid4().hex) as mark:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "one.py"), str(check.number), self._device, str(folder)],
                cwd=folder,
                env={**os.environ, MARK: mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit_s)
            found: dict[str, Any] | None = read_json(folder / "result.json")
            if found is None:
                end = f"over its {limit_s:.0f} s" if process.poll() is None else f"its process: {process.returncode}"
                found = {"state": "failed", "figure": end}
        text = log.read_text(errors="replace")
        return self._told(Result(check, found["state"], found["figure"], time.monotonic() - began, text))

    def _told(self, result: Result) -> Result:
        print(f"{result.check.number:2} {result.state:8} {result.check.title}", file=sys.stderr, flush=True)
        return result


@contextlib.contextmanager
def _ended(mark: str) -> Iterator[str]:
    """Nothing that has the mark outlives the block."""
    try:
        yield mark
    finally:
        for pid in processes(mark, MARK):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def page(results: Sequence[Result], described: dict[str, Any], device: str, seconds: float) -> str:
    """Markdown: on what it ran, a line for each check, and the last words of those that failed."""
    counts = {state: sum(each.state == state for each in results) for state in ("passed", "failed", "left out")}
    why = described.get("why") or "--device cpu"
    card = described["gpu"] if device == "cuda" else f"no GPU ({why}): what can be simulated, on the CPU"
    lines = [
        "# What only a GPU shows",
        "",
        f"{card}; driver {_driver()}; torch {described['torch']}, CUDA {described['CUDA']}; "
        f"Python {sys.version.split()[0]}; {time.strftime('%d %B %Y')}; {seconds:.0f} s.",
        "",
        ", ".join(f"{count} {state}" for state, count in counts.items()),
        "",
        "| | check | | figure | s |",
        "|--|--|--|--|--|",
    ]
    for each in results:
        figure = " ".join(each.figure.replace("|", "\\|").split())
        lines.append(f"| {each.check.number} | {each.check.title} | {each.state} | {figure} | {each.seconds:.0f} |")
    for each in results:
        if each.state == "failed":
            last = "\n".join(each.log.splitlines()[-25:])
            lines += ["", f"## {each.check.number}: {each.check.title}", "", "```", last, "```"]
    return "\n".join(lines) + "\n"


def _driver() -> str:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.check_output(asked, text=True, stderr=subprocess.DEVNULL).strip().splitlines()[0]
    return "none"


def main() -> int:
    parser = argparse.ArgumentParser(description="What only a GPU shows; see run.py")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"))
    parser.add_argument("--device", choices=["cuda", "cpu"])
    parser.add_argument("--only", type=int, nargs="+", default=sorted(CHECKS), choices=sorted(CHECKS), metavar="N")
    parser.add_argument("--jobs", type=int, default=max(1, len(os.sched_getaffinity(0)) // 4))
    asked = parser.parse_args()
    began = time.monotonic()
    described = json.loads(subprocess.check_output([sys.executable, "-c", DESCRIBE], text=True))
    device = asked.device or ("cuda" if described["gpu"] else "cpu")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="dtrain-gpu-") as folder:
        results = Suite(device, Path(folder)).run([CHECKS[number] for number in asked.only], asked.jobs)
    text = page(results, described, device, time.monotonic() - began)
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "results.md").write_text(text)
    logs = [f"==== {each.check.number}: {each.check.title}\n{each.log}" for each in results]
    (asked.out / "log.txt").write_text("\n".join(logs))
    print(text)
    return int(any(each.state == "failed" for each in results))


if __name__ == "__main__":
    sys.exit(main())
