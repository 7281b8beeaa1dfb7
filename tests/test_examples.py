"""The examples run as they stand, on one process and on several, with the same result."""

from __future__ import annotations

import runpy
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
        job = str(EXAMPLES / "digits" / "job.yaml")
        done = project.run("launch", "--gpus", ranks, "--run-dir", ranks, job, "fit.epochs=8")
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


def test_the_weights_load_into_the_bare_module(digits):
    names = runpy.run_path(str(EXAMPLES / "digits" / "net.py"))
    names["DigitNet"](width=32).load_state_dict(torch.load(digits.run_dir("3").best_weights, weights_only=True))


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


def test_gpt_is_the_same_under_any_strategy(project):
    """Tokens as the loss's unit, tied weights, a parameter group and warm-up, cut over 3 ranks and on one."""
    job, small = str(EXAMPLES / "gpt" / "job.yaml"), ["model.width=32", "model.depth=2"]
    small += ["data.batch_size=16", "fit.epochs=1"]
    small += [f"{where}.context=32" for where in ("model", "data.train", "data.val")]
    small += [f"data.{split}.modules=[argparse, ast, inspect]" for split in ("train", "val")]
    zero = ["fit.strategy=deepspeed", "deepspeed.zero_optimization.stage=2"]
    for name, ranks, settings in (("ddp", "1", []), ("fsdp", "3", ["fit.strategy=fsdp"]), ("deepspeed", "2", zero)):
        done = project.run("launch", "--gpus", ranks, "--run-dir", name, job, *small, *settings)
        assert done.code == 0, done.err
    [expected] = project.run_dir("ddp").rows()
    assert expected["val_loss"] < 5.0  # of a uniform guess it is 5.5
    for name in ("fsdp", "deepspeed"):
        [row] = project.run_dir(name).rows()
        assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
        assert row["val_acc"] == pytest.approx(expected["val_acc"], rel=1e-3)
        weights = torch.load(project.run_dir(name).best_weights, weights_only=True)
        assert weights["head.weight"].shape == (256, 32)


def test_resnet(project):
    job, small = str(EXAMPLES / "resnet" / "job.yaml"), ["data.batch_size=12", "data.workers=0", "fit.epochs=2"]
    small += [f"data.{split}.{key}" for split in ("train", "val") for key in ("size=32", "samples=24")]
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", job, *small)
    assert done.code == 0, done.err
    rows = project.run_dir().rows()
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.14])  # warm-up
    assert all("ema_acc" in row for row in rows)


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
