"""Ends that are not good ones: what is said, how soon all is over, and whether the card is free again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from checks import HERE, Job, Place, below, check, dtrain
from machine import SPARE, free_memory

from dtrain.files import read_json


def headline(text: str) -> str:
    """The line that names the rank."""
    found = [line for line in text.splitlines() if line.startswith("rank 0 failed")]
    assert found, f"no rank is named:\n{text}"
    return found[-1]


@check(18, "SIGKILL of a rank with loading processes: time until all is over and free", alone=True)
def killed(place: Place) -> str:
    before = free_memory(place)
    job = Job(place, "job", "model.acts=waits", "model.at=5", "data.workers=2")
    command = job.launch()
    waiting = job.folder / "waiting"
    command.until(waiting.exists)
    began = time.monotonic()
    os.kill(int(waiting.read_text()), signal.SIGKILL)
    done = command.wait()
    seconds = time.monotonic() - began
    assert done.code == 1, done.last_lines
    assert "SIGKILL" in headline(done.err), done.last_lines
    assert free_memory(place) > before - SPARE, f"{(before - free_memory(place)) >> 20} MiB are not free again"
    return below("seconds", seconds, 20)


@check(19, "a restart after it")
def restarted(place: Place) -> str:
    job = Job(place, "job", "model.acts=waits", "model.at=12", "data.workers=2")
    command = job.launch("--max-restarts", "1")
    waiting = job.folder / "waiting"
    command.until(waiting.exists)
    began = time.monotonic()
    os.kill(int(waiting.read_text()), signal.SIGKILL)
    job.go()  # for the rank that is started next
    done = command.wait()
    assert done.code == 0, done.last_lines
    status = read_json(job.run.status_file) or {}
    found = (status["state"], status["restarts"], [row["epoch"] for row in job.run.rows()])
    assert found == ("finished", 1, [1, 2, 3]), f"{found}"
    return f"finished {time.monotonic() - began:.1f} s after it"


@check(20, "out of memory, and an index beyond a tensor: the last words", alone=True)
def headlines(place: Place) -> str:
    figures = []
    for acts in ("allocates", "reaches"):
        job = Job(place, acts, f"model.acts={acts}", "model.at=5")
        done = job.train_until_it_fails()
        line = headline(done.err)
        figures.append(line.removeprefix("rank 0 failed: ")[:80])
        assert "net.py" in done.err, f"the place is not named:\n{done.last_lines}"
        if place.has_gpu:
            assert ("OutOfMemoryError" if acts == "allocates" else "CUDA error") in line, line
    return "; ".join(figures)


@check(21, "an endless kernel: what the watchdog says", alone=True)
def endless(place: Place) -> str:
    before = free_memory(place)
    job = Job(place, "job", "model.acts=hangs", "model.at=5", "launch.hang_timeout_s=8")
    began = time.monotonic()
    done = job.train_until_it_fails()
    line = headline(done.err)
    assert "has made no progress for" in line, line
    assert time.monotonic() - began < 80
    assert free_memory(place) > before - SPARE, f"{(before - free_memory(place)) >> 20} MiB are not free again"
    return line.removeprefix("rank 0 failed: ")


@check(24, "the exit of a script that raises", limit_s=120)
def raising(place: Place) -> str:
    script = [str(HERE / "raising.py")]
    (place.folder / "launched").mkdir()
    launched = dtrain(place.folder / "launched", "launch", "--gpus", "1", *script, "--", place.device).wait()
    ended = time.time()
    assert launched.code == 1, launched.last_lines
    assert "on purpose" in headline(launched.err), launched.last_lines
    figures = [below("launched, seconds", ended - raised_at(launched.out), 15)]
    (place.folder / "alone").mkdir()
    alone = subprocess.run(
        [sys.executable, *script, place.device], cwd=place.folder / "alone", capture_output=True, text=True
    )
    ended = time.time()
    assert alone.returncode == 1, alone.stderr
    assert "on purpose" in alone.stderr, alone.stderr
    return ", ".join([*figures, below("by itself", ended - raised_at(alone.stdout), 15)])


def raised_at(text: str) -> float:
    return float(text.split("RAISES ")[1].split()[0])
