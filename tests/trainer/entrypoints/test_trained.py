"""dtrain evaluate, predict, export and summary: of a run's model, on any number of processes, and of a job's."""

from __future__ import annotations

import importlib
import json
import os
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from command import DATA, NET
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dtrain import Fsdp, Trainer, load_weights, summary
from dtrain.errors import UserError
from dtrain.trainer.entrypoints.evaluate import Rows
from dtrain.trainer.entrypoints.export import _differences
from dtrain.trainer.metrics import plots

SIZE = 13  # samples to predict, in batches of 8: an uneven one for each of 2 and 3 ranks
WITH_STEP = """
from torch.nn.functional import cross_entropy

def step(model, batch):
    predictions = model(batch["x"])
    return {"loss": cross_entropy(predictions, batch["y"]), "predictions": predictions, "target": batch["y"]}
"""
OF_DICTS = """
import data

def points(size):
    return [{"x": x, "y": y} for x, y in data.points(size)]
"""
UNFRIENDLY = """
from net import Net as Friendly

class Net(Friendly):
    def forward(self, x):
        return self.layers(x) * (2.0 if x.sum() > 0 else 1.0)
"""
CONFUSION = {"_target_": "torchmetrics.ConfusionMatrix", "task": "multiclass", "num_classes": 2}


@pytest.fixture(scope="module")
def trained(new_project):
    """A run of two epochs, with a confusion matrix, in the folder `run`."""
    project = new_project("trained")
    # The first epoch is to be the best one, so that its weights are not the last.
    fit = {"epochs": 2, "early_stopping": {"monitor": "val_loss", "mode": "max"}}
    project.job(metrics={"confusion": CONFUSION}, launch={"device": "cpu"}, fit=fit)
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml")
    assert done.code == 0, done.err
    first, second = project.run_dir().rows()
    assert first["val_loss"] > second["val_loss"]
    (project.folder / "job.yaml").unlink()  # the run folder is enough
    for name in ("net.py", "data.py"):
        (project.folder / name).unlink()
    return project


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """net.py and data.py, imported."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "net.py").write_text(NET)
    (folder / "data.py").write_text(DATA)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("net"), importlib.import_module("data")
    sys.path.remove(str(folder))
    for name in ("net", "data"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def expected(trained, module):
    """The model's predictions of the first SIZE points, computed by hand, and the points."""
    net, data = module
    model = net.Net()
    load_weights(model, trained.run_dir().best_weights)
    points, _ = data.points(SIZE).tensors
    with torch.no_grad():
        return points, model(points)


@pytest.mark.parametrize("gpus", ["1", "3"])
def test_evaluate(gpus, trained, module):
    net, data = module
    done = trained.run("evaluate", "run", "--gpus", gpus, "data.val.size=13", "--weights", "last")
    assert done.code == 0, done.err
    model = net.Net()
    load_weights(model, trained.run_dir().last_weights)
    features, target = data.points(13).tensors
    with torch.no_grad():
        predictions = model(features)
    values = json.loads(done.out)
    assert values["val_loss"] == pytest.approx(nn.functional.cross_entropy(predictions, target).item(), rel=1e-6)
    pairs = torch.stack([target, predictions.argmax(1)])
    assert values["val_confusion"] == [[int(((pairs[0] == i) & (pairs[1] == j)).sum()) for j in (0, 1)] for i in (0, 1)]


@pytest.mark.parametrize("gpus", ["1", "3"])
def test_predict_a_set_of_the_job(gpus, trained, expected):
    out = f"val-{gpus}.npy"
    done = trained.run("predict", "run", "val", "data.val.size=13", "--gpus", gpus, "-o", out)
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    found = np.load(trained.folder / out)
    assert found.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(found), expected[1], rtol=1e-6, atol=1e-6)


def test_predict_files_of_features(trained, expected):
    points, predictions = expected
    np.save(trained.folder / "points.npy", points.double().numpy())
    np.savetxt(trained.folder / "named.csv", points.numpy(), delimiter=", ", header="a, b, c, d", comments="")
    for number, file in enumerate(("points.npy", "named.csv")):
        done = trained.run("predict", "run", file, "--gpus", "2", "--out", f"file-{number}.csv")
        assert done.code == 0, done.err
        found = np.loadtxt(trained.folder / f"file-{number}.csv", delimiter=",", dtype=np.float32)
        torch.testing.assert_close(torch.from_numpy(found), predictions, rtol=1e-6, atol=1e-6)
    assert not list(trained.folder.glob(".*"))


def test_nothing_is_overwritten(trained):
    first = trained.run("predict", "run", "train")
    assert first.out == "run/predictions.npy\n"
    before = (trained.folder / "run" / "predictions.npy").read_bytes()
    again = trained.run("predict", "run", "val")
    assert (again.code, again.err) == (2, "run/predictions.npy exists; name another file with --out\n")
    assert (trained.folder / "run" / "predictions.npy").read_bytes() == before


REFUSED = {
    "no-run": (["evaluate", "nowhere"], "nowhere holds no run: expected a run folder"),
    "weights": (["evaluate", "run", "--weights", "ema"], "ema.pt does not exist; there are best, last: --weights best"),
    "no-val": (
        ["evaluate", "run", "data.val=null", "fit.early_stopping=null"],
        "the job has no data.val to evaluate on; set one",
    ),
    "no-test": (["evaluate", "run", "--data", "test"], "the job has no data.test to evaluate on; set one"),
    "data": (
        ["evaluate", "run", "--data", "tset"],
        "--data tset: expected one of the job's datasets; did you mean test?",
    ),
    "override": (["evaluate", "run", "data.val.sise=3"], "data.points takes no argument sise; did you mean size?"),
    "no-file": (["predict", "run", "missing.npy"], "missing.npy: no such file"),
    "no-set": (["predict", "run", "vla"], "vla: expected features in a file, .npy or .csv, did you mean val?"),
    "out": (["predict", "run", "val", "-o", "a.txt"], "--out a.txt: expected a name ending in .npy or .csv"),
    "folder": (["export", "run", "--format", "pt", "-o", "none/a.pt"], "none/a.pt can't be written: No such file"),
    "format": (["export", "run", "--format", "tf"], "Invalid value for '--format'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_before_anything_starts(name, trained):
    arguments, says = REFUSED[name]
    done = trained.run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert "Traceback" not in done.err


FAULTY = {
    "text.csv": ("a,b,c,d\n1,2,3,4\n1,two,3,4\n", "text.csv:3: column b holds no number there"),
    "pickle.npy": (None, "pickle.npy can't be read: "),
}


@pytest.mark.parametrize("name", FAULTY)
def test_features_that_do_not_fit(name, trained):
    text, says = FAULTY[name]
    if text is None:
        np.save(trained.folder / name, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    else:
        (trained.folder / name).write_text(text)
    done = trained.run("predict", "run", name, "--gpus", "2", "--out", f"{name}.npy")
    assert done.code == 1
    assert says in done.last_lines
    assert not (trained.folder / f"{name}.npy").exists()


def test_predictions_that_the_disk_does_not_take(trained):
    """A limit on the size of files stands for a full disk: room is asked for before there is anything to write."""
    np.save(trained.folder / "many.npy", np.zeros((200_000, 4), np.float32))
    done = trained.shell("ulimit -f 1000; dtrain predict run many.npy -o big.npy data.batch_size=50000 --gpus 2")
    assert done.code == 1
    assert "predictions of shape [200000, 2] take 1.6 MB, which do not fit in " in done.last_lines
    assert "choose another place with --out" in done.last_lines
    assert not [path for path in trained.folder.iterdir() if "big.npy" in path.name]


def test_export_weights(trained):
    expected = torch.load(trained.run_dir().best_weights, weights_only=True)
    for form, load in (("safetensors", load_file), ("pt", lambda file: torch.load(file, weights_only=True))):
        done = trained.run("export", "run", "--format", form)
        assert (done.code, done.out) == (0, f"tiny.{form}\n"), done.err
        found = load(trained.folder / f"tiny.{form}")
        assert found.keys() == expected.keys()
        assert all(found[name].equal(value) for name, value in expected.items())
        assert os.stat(trained.folder / f"tiny.{form}").st_mode & 0o777 == 0o644


def test_export_onnx(trained, expected, module):
    done = trained.run("export", "run", "--format", "onnx")
    assert (done.code, done.out) == (0, "tiny.onnx\n"), done.err
    assert "compared with PyTorch by onnxruntime on 8 samples and on 1" in done.err
    session = onnxruntime.InferenceSession(trained.folder / "tiny.onnx", providers=["CPUExecutionProvider"])
    points, predictions = expected
    for count in (1, SIZE):  # any number of samples
        [found] = session.run(None, {"features": points[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), predictions[:count], rtol=1e-5, atol=1e-5)
    other = module[0].Net()  # as if the exporter had made a mistake
    with pytest.raises(UserError, match="onnxruntime's results differ from PyTorch's for "):
        list(_differences(trained.folder / "tiny.onnx", other, {"x": points}, SIZE))


def test_a_model_that_onnx_cannot_express(project):
    project.write("unfriendly.py", UNFRIENDLY)
    project.job(model={"_target_": "unfriendly.Net"}, fit={"epochs": 1}, launch={"device": "cpu"})
    assert project.run("launch", "--run-dir", "run", "job.yaml").code == 0
    done = project.run("export", "run", "--format", "onnx")
    assert (done.code, done.out) == (1, "")
    assert "the model can't be exported to ONNX: " in done.last_lines
    assert "must not depend on the values of tensors. --format safetensors takes any model" in done.last_lines
    assert not (project.folder / "tiny.onnx").exists()


def test_a_job_with_a_step_of_its_own(project):
    """Samples in dicts; the model is exported with what the step calls it with."""
    project.write("steps.py", WITH_STEP)
    project.write("dicts.py", OF_DICTS)
    job = {name: {"_target_": "dicts.points", "size": size} for name, size in (("train", 40), ("val", 12))}
    project.job(loss=None, step={"_target_": "steps.step"}, data={**job, "batch_size": 8}, fit={"epochs": 1})
    assert project.run("launch", "--run-dir", "run", "job.yaml").code == 0
    done = project.run("predict", "run", "val", "--gpus", "2")
    assert done.code == 0, done.err
    assert np.load(project.folder / "run" / "predictions.npy").shape == (12, 2)
    done = project.run("export", "run", "--format", "onnx")
    assert done.code == 0, done.err


def test_summary_of_a_job(project):
    done = project.run("summary", "job.yaml", "model.width=6")
    assert done.code == 0, done.err
    assert "Total params: 44" in done.out  # 4 * 6 + 6 + 6 * 2 + 2
    assert "[1, 6]" in done.out


# -- in Python -------------------------------------------------------------------------------------


def test_summary_of_a_model():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in net.state_dict().items()}
    found = summary(net, (4,))
    assert found.total_params == 4 * 3 + 3 + 6
    assert "BatchNorm1d" in str(found)
    assert Trainer(net, nn.MSELoss(), device="cpu").summary(features=torch.zeros(2, 4)).total_params == 21
    assert torch.get_rng_state().equal(state)
    assert net.training
    assert all(net.state_dict()[name].equal(value) for name, value in weights.items())
    with pytest.raises(UserError, match=r"does not take features of shape \[1, 5\]: "):
        summary(net, (5,))
    with pytest.raises(UserError, match="summary needs input_shape"):
        summary(net)


STRATEGIES = {"ddp": "ddp", "fsdp": Fsdp(wrap=["Linear"]), "ZeRO 3": {"zero_optimization": {"stage": 3}}}


def predict_and_evaluate(rank, world_size, strategy):
    """Of five samples in batches of two: the third rank never has one."""
    torch.manual_seed(rank)  # rank 0's weights count
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    trainer = Trainer(net, nn.CrossEntropyLoss(), strategy=STRATEGIES[strategy], device="cpu")
    data = TensorDataset(torch.arange(15.0).view(5, 3), torch.tensor([0, 1, 1, 0, 1]))
    shuffled = DataLoader(data, batch_size=2, shuffle=True)
    features_alone = DataLoader(TensorDataset(data.tensors[0]), batch_size=2)
    predictions = trainer.predict(shuffled)
    assert trainer.predict(features_alone).equal(predictions)
    return predictions, trainer.evaluate(shuffled)["val_loss"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trainer_predicts_each_sample_once_in_the_sets_order(strategy):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        expected = net(torch.arange(15.0).view(5, 3))
    loss = nn.functional.cross_entropy(expected, torch.tensor([0, 1, 1, 0, 1])).item()
    for predictions, val_loss in run_ranks(3, predict_and_evaluate, strategy):
        torch.testing.assert_close(predictions, expected, rtol=1e-5, atol=1e-6)
        assert val_loss == pytest.approx(loss, rel=1e-5)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3)


def test_what_cannot_be_predicted():
    trainer = Trainer(nn.Linear(3, 2), device="cpu")
    with pytest.raises(UserError, match="Stream has no order: predict needs a DataLoader over a dataset with indices"):
        trainer.predict(DataLoader(Stream(), batch_size=2))
    flat = Trainer(nn.Flatten(0), device="cpu")  # all samples' numbers in one row
    with pytest.raises(UserError, match=r"a row for each sample of 2, not float32 \[6\]"):
        flat.predict(DataLoader(torch.zeros(2, 3), batch_size=2))


# -- pictures --------------------------------------------------------------------------------------


def test_a_run_leaves_its_pictures(trained):
    names = {path.name for path in trained.run_dir().plots.iterdir()}
    assert names == {"curves.png", "train_confusion.png", "val_confusion.png"}
    for path in trained.run_dir().plots.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_what_is_drawn():
    rows = [
        {"epoch": epoch, "step": 5 * epoch, "lr": 0.1, "samples_per_s": 9.0, "train_loss": 1 / epoch}
        | {"val_loss": 2 / epoch, "ema_loss": 3.0, "val_acc": float("nan"), "val_confusion": [[1.0, 0.0], [0.0, 1.0]]}
        for epoch in (1, 2)
    ]
    phases = ("train", "val", "ema")
    assert list(plots.curves(rows, phases)) == ["loss", "acc", "lr"]
    assert plots.curves(rows, phases)["loss"] == {
        "train": [(1, 1.0), (2, 0.5)],
        "val": [(1, 2.0), (2, 1.0)],
        "ema": [(1, 3.0), (2, 3.0)],
    }
    rows = [{"epoch": 1, "step": 5, "val_clean_acc": 1.0, "val_noisy_acc": 0.5}]
    assert plots.curves(rows, ("train", "val_clean", "val_noisy")) == {
        "acc": {"val_clean": [(1, 1.0)], "val_noisy": [(1, 0.5)]}
    }
    figure = plots._curves({name: {"val": [(1, 1.0)]} for name in "abcd"}, "epoch", 1)
    assert [axes.axison for axes in figure.axes] == [True] * 4 + [False] * 2  # of two rows of three


# -- rows of files ---------------------------------------------------------------------------------

TABLES = {
    "plain": ("1,2\n3,4\n", [[1, 2], [3, 4]]),
    "named": ("a, b\n1, 2.5\n", [[1, 2.5]]),
    "one column": ("7\n8\n", [[7], [8]]),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_with_and_without_a_header(name, tmp_path):
    text, rows = TABLES[name]
    (tmp_path / "table.csv").write_text(text)
    found = Rows(tmp_path / "table.csv")
    assert [found[index].tolist() for index in range(len(found))] == rows
    assert found[0].dtype == torch.float32


def test_arrays_keep_whole_numbers(tmp_path):
    np.save(tmp_path / "pixels.npy", np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    found = Rows(tmp_path / "pixels.npy")
    assert (len(found), found[1].dtype, found[1].shape) == (2, torch.uint8, (3, 4))
    for array in (np.array(3.0), np.array(["a"])):
        np.save(tmp_path / "wrong.npy", array)
        with pytest.raises(UserError, match=r"holds a single number|is not an array of numbers"):
            len(Rows(tmp_path / "wrong.npy"))
