"""The examples run as they stand, on one process and on several, with the same result."""

from __future__ import annotations

import re
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from marks import campaign
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from training import approximately, epoch_order, timeless

import dtrain

EXAMPLES = Path(__file__).parents[2] / "examples"


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


@pytest.fixture(scope="module")
def gpt(new_project):
    """Trains a small one by the name of its strategy; on one rank where there is nothing to cut."""
    project = new_project("gpt")
    job, small = str(EXAMPLES / "gpt" / "job.yaml"), ["model.width=32", "model.depth=2"]
    small += ["data.batch_size=16", "fit.epochs=1"]
    small += [f"{where}.context=32" for where in ("model", "data.train", "data.val")]
    small += [f"data.{split}.modules=[argparse, ast, inspect]" for split in ("train", "val")]
    settings = {"deepspeed": ["deepspeed.zero_optimization.stage=2"]}

    def train(name, ranks):
        strategy = [f"fit.strategy={name}", *settings.get(name, [])]
        done = project.run("launch", "--gpus", ranks, "--run-dir", name, job, *small, *strategy)
        assert done.code == 0, done.err
        return project.run_dir(name)

    whole = train("ddp", "1")
    assert whole.rows()[0]["val_loss"] < 5.0  # of a uniform guess it is 5.5
    return whole, train


@pytest.mark.parametrize(("name", "ranks"), [("fsdp", "3"), campaign("deepspeed", "2")])
def test_gpt_is_the_same_under_any_strategy(name, ranks, gpt):
    """Tokens as the loss's unit, tied weights, a parameter group and warm-up, cut over ranks and on one."""
    whole, train = gpt
    run = train(name, ranks)
    [expected], [row] = whole.rows(), run.rows()
    assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-5)
    assert row["val_acc"] == pytest.approx(expected["val_acc"], rel=1e-3)
    assert torch.load(run.best_weights, weights_only=True)["head.weight"].shape == (256, 32)


def test_a_stream_without_an_end_goes_on_where_it_was_stopped(project):
    small = ["model.width=32", "model.depth=2", "data.batch_size=16", "fit.report_every=20", "fit.validate_every=100"]
    small += [f"{where}.context=32" for where in ("model", "data.train", "data.val")]
    small += [f"data.{split}.modules=[argparse, ast]" for split in ("train", "val")]

    def start(ranks, *options):
        job = str(EXAMPLES / "gpt" / "endless.yaml")
        return project.start("launch", "--gpus", ranks, "--run-dir", ranks, *options, job, *small, "fit.steps=200")

    whole = start("1").wait()
    assert whole.code == 0, whole.err
    stopped = start("2")
    stopped.until(lambda: project.run_dir("2").metrics.exists() and project.run_dir("2").rows())
    stopped.signal(signal.SIGTERM)
    assert stopped.wait().code == 75
    continued = start("2", "--resume").wait()
    assert continued.code == 0, continued.err
    rows, expected = project.run_dir("2").rows(), project.run_dir("1").rows()
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [*range(20, 201, 20)]
    for row, alone in zip(rows, expected, strict=True):
        assert timeless(row) == approximately(timeless(alone), rel=1e-5)
    assert rows[-1]["val_loss"] < 3.5  # of a uniform guess it is 5.5


def test_resnet(project):
    job, small = str(EXAMPLES / "resnet" / "job.yaml"), ["data.batch_size=12", "data.workers=0", "fit.epochs=2"]
    small += [f"data.{split}.{key}" for split in ("train", "val") for key in ("size=32", "samples=24")]
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", job, *small)
    assert done.code == 0, done.err
    rows = project.run_dir().rows()
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.07])  # warm-up, halfway down the cosine
    assert all("ema_acc" in row for row in rows)


def test_finetune(project):
    """A part stays as it was in the file, a part is trained after an epoch, and the whole learns."""
    torch.manual_seed(0)
    before = torchvision.models.resnet18().state_dict()  # of 1000 classes
    torch.save(before, project.folder / "resnet18.pt")
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", str(EXAMPLES / "finetune" / "job.yaml"))
    assert done.code == 0, done.err
    assert "init_from: left out of the file: fc.weight, fc.bias" in done.err
    run = project.run_dir()
    assert run.rows()[-1]["val_acc"] > 0.9
    after = torch.load(run.last_weights, weights_only=True)
    ends = ("weight", "mean")
    same = {name: torch.equal(after[name], value) for name, value in before.items() if name.endswith(ends)}
    assert {name.split(".")[0] for name, is_same in same.items() if not is_same} == {"layer4", "fc"}


def test_a_gan_does_not_depend_on_the_number_of_ranks(project):
    """In its first steps: each amplifies what was rounded before, as in a plain loop that adds up a batch in parts."""
    histories = {}
    for ranks, length in (("1", "fit.epochs=8"), ("3", "fit.steps=25")):
        job = str(EXAMPLES / "gan" / "job.yaml")
        settings = length, "fit.report_every=8", "scheduler=null"
        done = project.run("launch", "--gpus", ranks, "--run-dir", ranks, job, *settings)
        assert done.code == 0, done.err
        histories[ranks] = [timeless(row) for row in project.run_dir(ranks).rows()]
    for row, alone in zip(histories["3"][:3], histories["1"][:3], strict=True):
        assert row == approximately(alone, 1e-5)
    near = [row["val_near"] for row in histories["1"] if "val_near" in row]
    assert near[-1] > 2 * near[0]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # which PEFT looks at
def test_a_language_model_of_transformers_and_its_lora(project, monkeypatch):
    """The same on two ranks, which share the weights or cut them; the adapter alone is trained, and PEFT reads it."""
    peft = pytest.importorskip("peft")
    folder = EXAMPLES / "huggingface"
    small = [f"data.{split}.{key}" for split in ("train", "val") for key in ("context=32", "modules=[argparse, ast]")]

    def train(name, job, ranks, *overrides):
        options = ["--gpus", ranks, "--run-dir", name, str(folder / job), *small, *overrides]
        done = project.run("launch", *options)
        assert done.code == 0, done.err
        return project.run_dir(name)

    alone, code = (
        train(f"runs/{name}", "job.yaml", ranks, "fit.epochs=4") for name, ranks in (("1", "1"), ("code", "2"))
    )
    expected = train("runs/lora-1", "lora.yaml", "1", "fit.epochs=2")
    lora = train("runs/lora-2", "lora.yaml", "2", "fit.epochs=2", "fit.strategy=fsdp")
    for run, one in ((code, alone), (lora, expected)):
        for row, row_alone in zip(run.rows(), one.rows(), strict=True):
            assert timeless(row) == approximately(timeless(row_alone), rel=1e-5)
    assert code.rows()[-1]["val_loss"] < 3.8  # of a uniform guess it is 5.5
    base, weights = (torch.load(run.best_weights, weights_only=True) for run in (code, lora))
    for name, value in weights.items():
        if "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, base[plain]), name
    monkeypatch.chdir(project.folder)
    in_process(folder, "save_adapter.py", str(lora.path), "adapter", monkeypatch=monkeypatch)
    del sys.modules["net"]  # a common name
    names = runpy.run_path(str(folder / "net.py"))
    net = names["llama"](width=64, depth=2)
    dtrain.load_weights(net, code.path)
    data = runpy.run_path(str(folder / "data.py"))["Texts"]("prose", "val", 32, ["argparse", "ast"])
    batch = {key: torch.stack([sample[key] for sample in data]) for key in data[0]}
    with torch.no_grad():
        before = float(net(**batch).loss)
        after = float(peft.PeftModel.from_pretrained(net, "adapter").eval()(**batch).loss)
    assert after == pytest.approx(lora.rows()[-1]["val_loss"], rel=1e-5)
    assert after < before - 0.1


def test_lenet(project, mnist_root):
    """From the job to ONNX, on images that were not trained on."""
    job = str(EXAMPLES / "mnist" / "lenet.yaml")
    options = [*(f"data.{split}.root={mnist_root}" for split in ("train", "val")), "data.workers=0", "fit.epochs=2"]
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", job, *options)
    assert done.code == 0, done.err
    row = project.run_dir().rows()[-1]
    confusion = np.array(row["val_confusion"])
    assert (confusion.shape, confusion.sum()) == ((10, 10), 100)
    assert confusion.trace() / 100 == pytest.approx(row["val_acc"])
    assert (project.run_dir().plots / "val_confusion.png").exists()
    done = project.run("export", "run", "--format", "onnx")
    assert done.code == 0, done.err
    assert "compared with PyTorch by onnxruntime on 8 samples" in done.err


def in_process(folder, script, *arguments, monkeypatch):
    """Run an example as python does, without the seconds that imports take."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(str(folder / script), run_name="__main__")


def test_rings(project, monkeypatch):
    """Focal loss, L1, L2 and AUC: a plain loop's numbers, on 3 processes; and their picture."""
    folder = EXAMPLES / "rings"
    done = project.run("launch", "--gpus", "3", "--run-dir", "run", str(folder / "job.yaml"), "fit.epochs=2")
    assert done.code == 0, done.err
    names = runpy.run_path(str(folder / "rings.py"))
    (points, labels), (val_points, val_labels) = (names["rings"](split).tensors for split in ("train", "val"))
    torch.manual_seed(0)
    net = names["RingNet"]()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
    for epoch, row in enumerate(project.run_dir().rows(), start=1):
        total = 0.0
        for chosen in epoch_order(len(labels), 0, epoch).split(100):
            p, y = torch.sigmoid(net(points[chosen])), labels[chosen]
            loss = -(0.75 * y * (1 - p) ** 2 * p.log() + 0.25 * (1 - y) * p**2 * (1 - p).log()).mean()
            total += loss.item() * len(chosen)
            for name, weight in net.named_parameters():
                if "bias" not in name:
                    loss = loss + 1e-4 * weight.abs().sum() + 0.5e-4 * weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert row["train_loss"] == pytest.approx(total / len(labels), rel=1e-5)
        with torch.no_grad():
            # Of predictions that hardly differ yet, rounding decides which is the larger one.
            assert row["val_auc"] == pytest.approx(roc_auc_score(val_labels, net(val_points)), abs=1e-3)
    weights = torch.load(project.run_dir().last_weights, weights_only=True)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    in_process(folder, "scatter.py", str(project.run_dir().path), monkeypatch=monkeypatch)
    assert (project.run_dir().path / "rings.png").read_bytes().startswith(b"\x89PNG")


def test_regression(project, capsys, monkeypatch):
    """A million points cut short: the same line from one process and from three."""
    folder, few = EXAMPLES / "regression", ["--points", "3001", "--steps", "400"]
    in_process(folder, "train.py", *few, monkeypatch=monkeypatch)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("w = ")]
    weights = [float(number) for number in re.findall(r"-?\d+\.\d+", line)]
    assert weights == pytest.approx([2.0, -3.0, 10.0], abs=0.1)
    done = project.run("launch", "--gpus", "3", str(folder / "job.yaml"), f"script=[train.py, {', '.join(few)}]")
    assert done.code == 0, done.err
    assert line in done.out


def test_matrix_product(capsys, monkeypatch):
    in_process(EXAMPLES / "regression", "matmul.py", monkeypatch=monkeypatch)
    assert re.search(r"^cpu: [\d.]+ ms, [\d,]+ GFLOPS$", capsys.readouterr().out, re.MULTILINE)


def test_the_tutorials_network_has_their_number_of_parameters():
    net = runpy.run_path(str(EXAMPLES / "mnist" / "net.py"))["MnistNet"]()
    assert dtrain.summary(net, (1, 28, 28)).total_params == 320 + 51264 + 2080 + 330
    # For 32x32 pixels of three colours and two classes the tutorials have one output.
    net.layers[0], net.layers[-1] = torch.nn.Conv2d(3, 32, 3), torch.nn.Linear(32, 1)
    found = dtrain.summary(net, (3, 32, 32))
    assert found.total_params == 54_273
    assert "Total params: 54,273" in str(found)
