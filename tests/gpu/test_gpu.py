"""`make gpu` on a machine without a GPU: its checks can be made, and its page says how each ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import suite
from checks import CHECKS, LeftOut, Place
from speed import length, merged, shared

ROOT = Path(__file__).parents[2]


def test_there_are_25_checks():
    assert sorted(CHECKS) == list(range(1, 26))


@pytest.mark.parametrize("number", [9, 10])
def test_numbers_beside_a_plain_loop(number, tmp_path, monkeypatch):
    """Those that need no process of their own, on the CPU."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)
    assert CHECKS[number].run(Place("cpu", tmp_path))


def test_what_needs_a_gpu_says_so(tmp_path):
    with pytest.raises(LeftOut, match="fp16 needs a GPU"):
        CHECKS[11].run(Place("cpu", tmp_path))


def test_one_failure_hides_nothing(tmp_path, monkeypatch):
    """A check that ends its process, one that hangs, and one that passes: a line for each, and the last words."""
    (tmp_path / "one.py").write_text(
        "import json, os, sys, time\n"
        "number, device, folder = sys.argv[1:]\n"
        "print('last words of', number, flush=True)\n"
        "if number == '1': os.kill(os.getpid(), 9)\n"
        "if number == '2': time.sleep(1000)\n"
        "open(f'{folder}/result.json', 'w').write(json.dumps({'state': 'passed', 'figure': '1 | 2'}))\n"
    )
    monkeypatch.setattr(suite, "HERE", tmp_path)
    limits = {1: 300.0, 2: 1.0, 3: 300.0}
    chosen = [suite.Check(number, "a title", CHECKS[1].run, limits[number], number == 3) for number in limits]
    results = suite.Suite("cuda", tmp_path).run(chosen, jobs=2)
    assert [result.state for result in results] == ["failed", "failed", "passed"]
    text = suite.page(results, {"gpu": "a card", "torch": "2.11", "CUDA": "13.0"}, "cuda", 4.0)
    lines = [line for line in text.splitlines() if line.startswith("| ") and "title" in line]
    assert [line.rsplit("|", 2)[0] for line in lines] == [
        "| 1 | a title | failed | its process: -9 ",
        "| 2 | a title | failed | over its 1 s ",
        "| 3 | a title | passed | 1 \\| 2 ",
    ]
    assert "a card; driver" in text
    assert "last words of 1" in text
    assert "last words of 3" not in text


def test_spans():
    kernels = merged([(4, 6), (0, 2), (1, 3)])
    assert kernels == [(0, 3), (4, 6)]
    assert (length(kernels), shared((2, 5), kernels)) == (5, 2)


@pytest.mark.campaign
def test_all_that_can_be_simulated(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tests/gpu/run.py"), "--device", "cpu", "--out", str(tmp_path)])
    assert done.returncode == 0
    assert (tmp_path / "results.md").read_text().count("\n| ") == 25
