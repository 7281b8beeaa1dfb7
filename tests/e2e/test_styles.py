"""A loop of one's own, a step of one's own, and Trainer's: the same result, on 1 process and on 3."""

from __future__ import annotations

import ast
import difflib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import epoch_order

from dtrain import Ranks, Trainer, load_weights

STYLES = Path(__file__).parents[2] / "examples" / "styles"
EPOCHS = 5
VALUES = ("train_loss", "val_loss", "val_acc")


@pytest.fixture(scope="module")
def project(new_project):
    """The examples, copied to where they run."""
    project = new_project("styles")
    shutil.copytree(STYLES, project.folder, dirs_exist_ok=True)
    return project


# Each as `python SCRIPT` runs it, but for the imports, which take seconds and are made once.
ONE_BY_ONE = """
import contextlib, io, json, runpy, sys
printed = {}
for script in sys.argv[1:]:
    sys.argv, out = [script], io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(script, run_name="__main__")
    printed[script] = out.getvalue()
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def alone(project):
    """What the scripts print in one process."""
    scripts = ["plain_loop.py", "own_loop.py", "own_step.py", "with_trainer.py"]
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, *scripts],
        cwd=project.folder,
        env=project.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (project.folder / "net.pt").rename(project.folder / "alone.pt")
    return json.loads(done.stdout.splitlines()[-1])


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


def test_a_loop_of_ones_own(project, alone, plain):
    require_equal(printed(alone["own_loop.py"]), torch.load(project.folder / "alone.pt", weights_only=True), plain)
    out, _ = launch(project, "own_loop.py")
    require_equal(printed(out), torch.load(project.folder / "net.pt", weights_only=True), plain)


@pytest.mark.parametrize("target", ["own_step.py", "with_trainer.py"])
def test_in_one_process(target, project, alone, plain):
    assert alone[target].count("val_acc") >= 1
    [folder] = (path for path in project.runs() if path.name.startswith(target.removesuffix(".py")))
    run = project.run_dir(f"runs/{folder.name}")
    require_equal(run.rows(), torch.load(run.last_weights, weights_only=True), plain)


@pytest.mark.parametrize("target", ["own_step.py", "job.yaml", "with_trainer.py"])
def test_on_three_processes(target, project, plain):
    _, run = launch(project, target)
    require_equal(run.rows(), torch.load(run.last_weights, weights_only=True), plain)


def test_the_plain_loop_learns(alone):
    assert printed(alone["plain_loop.py"])[-1]["val_acc"] > 0.9


def any_network():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(30, 6), torch.randint(3, (30,)))
    loader = DataLoader(data, batch_size=8, shuffle=True)
    return net, torch.optim.Adam(net.parameters(), lr=0.01), loader, DataLoader(data, batch_size=7)


def step(model, batch):
    features, target = batch
    return {"loss": nn.functional.cross_entropy(model(features), target)}


def test_any_network_on_one_process(tmp_path):
    """With dropout and batch norm: what is drawn in a loop of one's own is what Trainer draws."""
    net, optimizer, train_data, val_data = any_network()
    ranks = Ranks(device="cpu")
    wrapped, train_data, val_data = ranks.wrap(net), ranks.shard(train_data), ranks.shard(val_data)
    for _ in range(3):
        wrapped.train()
        for batch in train_data:
            optimizer.zero_grad()
            ranks.scale_loss(step(wrapped, batch)["loss"]).backward()
            optimizer.step()
        wrapped.eval()
        for batch in val_data:
            step(wrapped, batch)
    expected = net.state_dict()
    for name, options in {"step": {"step": step}, "class": {}}.items():
        net, optimizer, train_data, val_data = any_network()
        loss_fn = None if options else nn.CrossEntropyLoss()
        trainer = Trainer(net, loss_fn, optimizer, device="cpu", run_dir=tmp_path / name)
        trainer.fit(train_data, val_data, epochs=3, **options)
        for key, value in net.state_dict().items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6, msg=f"{name}: {key}")


def test_what_data_parallel_has_saved_loads(tmp_path, monkeypatch):
    """`module.` before each name, as the tutorials' script saves it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(STYLES)
    runpy.run_path(str(STYLES / "data_parallel.py"))
    saved = torch.load("net.pt", weights_only=True)
    net = runpy.run_path(str(STYLES / "digits.py"))["DigitNet"]()
    assert saved.keys() == {f"module.{name}" for name in net.state_dict()}
    load_weights(net, "net.pt")
    assert all(saved[f"module.{name}"].equal(value) for name, value in net.state_dict().items())


def code(path):
    """The lines without the docstring."""
    return ast.unparse(ast.parse(path.read_text()).body[1:])


def test_a_loop_of_ones_own_differs_in_eight_lines():
    plain, own = (code(STYLES / f"{name}_loop.py") for name in ("plain", "own"))
    changed = [line for line in difflib.ndiff(plain.splitlines(), own.splitlines()) if line.startswith("+")]
    assert len(changed) == 8, changed


def test_a_loop_of_ones_own_continues_by_two_lines():
    own, resumed = (code(STYLES / f"{name}.py") for name in ("own_loop", "own_loop_resumed"))
    changed = [line for line in difflib.ndiff(own.splitlines(), resumed.splitlines()) if line.startswith("+")]
    assert len(changed) == 2, changed
