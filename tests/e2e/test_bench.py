"""Each script of bench/ runs, in its smallest setting. What it measures then means nothing."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
HELPERS = {"loops.py"}
# By script: its arguments, and what is among the last that it prints.
SETTINGS = {
    "batch_norm.py": ("--ranks 1 --batches 32 --epochs 1", "| 32 | 1 | 32 | "),
    "checkpoint.py": ("--megabytes 50 --repeats 1", "dtrain's checkpoint "),
    "launch.py": ("--ranks 1 --repeats 1 --launchers dtrain --plot launch.png", "| 1 | dtrain | "),
    "loading.py": ("--repeats 1 --images 4", "32x32"),
    "order.py": ("--samples 5000 --repeats 1", "a batch of 256 at a random step"),
    "step.py": ("--rounds 1 --steps 20", "| dtrain | "),
}


def test_every_script_is_tried():
    assert {path.name for path in BENCH.glob("*.py")} == SETTINGS.keys() | HELPERS


@pytest.mark.parametrize("script", SETTINGS)
def test_a_script_runs(script, tmp_path, monkeypatch, capfd):
    arguments, line = SETTINGS[script]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(BENCH / script), *arguments.split()])
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(BENCH / script), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
        for module in ("data", "loops"):  # names that others may have too
            sys.modules.pop(module, None)
    printed = capfd.readouterr().out
    assert line in printed, printed
