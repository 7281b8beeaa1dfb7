"""The examples run as they stand, on one process and on several, with the same result."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def digits(new_project):
    """The digits job, trained on 1 and 3 ranks."""
    project = new_project("digits")
    for ranks in ("1", "3"):
        done = project.run("launch", "--gpus", ranks, "--run-dir", ranks, str(EXAMPLES / "digits" / "job.yaml"))
        assert done.code == 0, done.err
    return project


def test_digits_are_learnt(digits):
    assert max(row["val_acc"] for row in digits.run_dir("3").rows()) > 0.97


def test_digits_do_not_depend_on_the_number_of_ranks(digits):
    rows, expected = digits.run_dir("3").rows(), digits.run_dir("1").rows()
    assert len(rows) == len(expected)
    for row, alone in zip(rows, expected, strict=True):
        assert (row["train_acc"], row["val_acc"]) == (alone["train_acc"], alone["val_acc"])
        for name in ("train_loss", "val_loss"):
            assert row[name] == pytest.approx(alone[name], rel=1e-5)


def test_the_weights_load_into_the_bare_module(digits, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "digits")
    from net import DigitNet  # the example's own

    DigitNet(width=32).load_state_dict(torch.load(digits.run_dir("3").best_weights, weights_only=True))


def write_idx(path: Path, values: np.ndarray) -> None:
    """MNIST's file format: two zero bytes, the type (8: unsigned byte), the number of dimensions, their sizes."""
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    """Where torchvision looks for MNIST, with scikit-learn's digits enlarged to 28 x 28."""
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = load_digits(return_X_y=True)
    large = np.pad(np.kron(images.reshape(-1, 8, 8) * 15, np.ones((3, 3))), ((0, 0), (2, 2), (2, 2)))
    for name, part in {"train": slice(0, 400), "t10k": slice(400, 500)}.items():
        write_idx(raw / f"{name}-images-idx3-ubyte", large[part])
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels[part])
    return raw.parent.parent


def test_mnist(project, mnist_root):
    roots = [f"data.{split}.root={mnist_root}" for split in ("train", "val")]
    job = str(EXAMPLES / "mnist" / "job.yaml")
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", job, *roots, "fit.epochs=4", "data.workers=1")
    assert done.code == 0, done.err
    rows = project.run_dir().rows()
    assert [row["step"] for row in rows] == [4, 8, 12, 16]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    weights = torch.load(project.run_dir().last_weights, weights_only=True)
    assert sum(value.numel() for value in weights.values()) == 320 + 51264 + 2080 + 330  # the tutorials' network


@pytest.mark.parametrize("gpus", ["plainly", "2"])
def test_script(project, gpus):
    script = shutil.copy(EXAMPLES / "script" / "train.py", project.folder)
    if gpus == "plainly":
        done = subprocess.run(
            [sys.executable, script, "--epochs", "3"],
            cwd=project.folder,
            env=project.environment,
            capture_output=True,
            text=True,
        )
        code, out = done.returncode, done.stdout
    else:
        launched = project.run("launch", "--gpus", gpus, script, "--", "--epochs", "3")
        code, out = launched.code, launched.out
    assert code == 0
    assert out.count("val_acc") == 1  # the history, printed once
    (run,) = project.runs()
    rows = project.run_dir(f"runs/{run.name}").rows()
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert rows[-1]["val_acc"] > 0.8
