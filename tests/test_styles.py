"""A loop of one's own, a step of one's own, and Trainer's: the same result, on 1 process and on 3."""

from __future__ import annotations

import ast
import difflib
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training import epoch_order

from dtrain import load_weights

STYLES = Path(__file__).parents[1] / "examples" / "styles"
EPOCHS = 5
VALUES = ("train_loss", "val_loss", "val_acc")


@pytest.fixture(scope="module")
def project(new_project):
    """The examples, copied to where they run."""
    project = new_project("styles")
    shutil.copytree(STYLES, project.folder, dirs_exist_ok=True)
    return project


def python(project, script):
    done = subprocess.run(
        [sys.executable, script], cwd=project.folder, env=project.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def launch(project, *arguments):
    done = project.run("launch", "--gpus", "3", "--run-dir", f"run-{arguments[0]}", *arguments)
    assert done.code == 0, done.err
    return done.out, project.run_dir(f"run-{arguments[0]}")


def printed(out):
    """The rows that own_loop.py and plain_loop.py print."""
    return [ast.literal_eval(line[line.index("{") :]) for line in out.splitlines() if "{" in line]


@pytest.fixture(scope="module")
def plain():
    """The values and weights of a plain loop in dtrain's order of samples."""
    names = runpy.run_path(str(STYLES / "digits.py"))
    torch.manual_seed(0)
    net, loss_fn = names["DigitNet"](), nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    (features, labels), (val_features, val_labels) = (names["digits"](split).tensors for split in ("train", "val"))
    rows = []
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for chosen in epoch_order(len(labels), 0, epoch).split(64):
            loss = loss_fn(net(features[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(chosen)
        with torch.no_grad():
            predictions = net(val_features)
        val_loss, right = loss_fn(predictions, val_labels).item(), predictions.argmax(1) == val_labels
        rows.append(dict(zip(VALUES, (total / len(labels), val_loss, right.float().mean().item()), strict=True)))
    return rows, net.state_dict()


def require_equal(rows, weights, plain):
    """Values to 1e-6, and weights to 1e-6 of their norm (Adam makes steps of rounding where gradients are none)."""
    expected_rows, expected = plain
    for row, values in zip(rows, expected_rows, strict=True):
        assert {name: row[name] for name in VALUES} == pytest.approx(values, rel=1e-6, abs=1e-6)
    for found, value in zip(weights.values(), expected.values(), strict=True):
        assert (found - value).norm() < 1e-6 * value.norm()


@pytest.mark.parametrize("processes", [1, 3])
def test_a_loop_of_ones_own(processes, project, plain):
    out = python(project, "own_loop.py") if processes == 1 else launch(project, "own_loop.py")[0]
    require_equal(printed(out), torch.load(project.folder / "net.pt", weights_only=True), plain)


@pytest.mark.parametrize("target", ["own_step.py", "with_trainer.py"])
def test_in_one_process(target, project, plain):
    python(project, target)
    [folder] = (path for path in project.runs() if path.name.startswith(target.removesuffix(".py")))
    run = project.run_dir(f"runs/{folder.name}")
    require_equal(run.rows(), torch.load(run.last_weights, weights_only=True), plain)


@pytest.mark.parametrize("target", ["own_step.py", "job.yaml", "with_trainer.py"])
def test_on_three_processes(target, project, plain):
    _, run = launch(project, target)
    require_equal(run.rows(), torch.load(run.last_weights, weights_only=True), plain)


def test_the_plain_loop_learns(project):
    assert printed(python(project, "plain_loop.py"))[-1]["val_acc"] > 0.9


def test_what_data_parallel_has_saved_loads(project):
    """`module.` before each name, as the tutorials' script saves it."""
    python(project, "data_parallel.py")
    saved = torch.load(project.folder / "net.pt", weights_only=True)
    net = runpy.run_path(str(STYLES / "digits.py"))["DigitNet"]()
    assert saved.keys() == {f"module.{name}" for name in net.state_dict()}
    load_weights(net, project.folder / "net.pt")
    assert all(saved[f"module.{name}"].equal(value) for name, value in net.state_dict().items())


def code(path):
    """The lines without the docstring."""
    return ast.unparse(ast.parse(path.read_text()).body[1:])


def test_a_loop_of_ones_own_differs_in_eight_lines():
    plain, own = (code(STYLES / f"{name}_loop.py") for name in ("plain", "own"))
    changed = [line for line in difflib.ndiff(plain.splitlines(), own.splitlines()) if line.startswith("+")]
    assert len(changed) == 8, changed
