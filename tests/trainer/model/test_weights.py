"""Files of weights: what a run writes opens everywhere, and what others write is loaded or refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from training import Job, Samples, train

from dtrain import load_weights
from dtrain.errors import UserError
from dtrain.trainer.model.weights import bare_state_dict, save_weights

NUM_SAMPLES, BATCH, SEED = 30, 10, 7


class Net(nn.Module):
    """With batch norm, and with layers called as wrappers call theirs."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
        self.head = nn.Module()
        self.head.module = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head.module(self.module(x))


def plain_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# -- what a run writes ---------------------------------------------------------------------------


def job(kind: str) -> Job:
    torch.manual_seed(SEED)
    net = Net()
    if kind == "compiled":
        net = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizer, "seed": SEED}
    data = Samples(torch.randn(NUM_SAMPLES, 4), torch.randint(2, (NUM_SAMPLES,)))
    return {"trainer": trainer, "train": data, "val": data, "batch_size": BATCH, "fit": {"epochs": 2}}


@pytest.mark.parametrize(("world_size", "kind"), [(1, "plain"), (2, "plain"), (2, "compiled")])
def test_the_weights_of_a_run_load_into_the_bare_module(world_size, kind, tmp_path):
    ((rows, trained), *_) = train(world_size, tmp_path, job, kind)
    data = job("plain")["train"]
    net = Net()
    for name in ("best", "last"):
        weights = torch.load(tmp_path / f"weights/{name}.pt", weights_only=True)
        assert net.load_state_dict(weights).missing_keys == []
        with torch.no_grad():
            loss = nn.functional.cross_entropy(net.eval()(data.features), data.target).item()
        losses = [row["val_loss"] for row in rows]
        assert loss == pytest.approx(min(losses) if name == "best" else losses[-1], rel=1e-5)
    assert all(map(torch.equal, weights.values(), trained.values()))


def save(net: nn.Module, path: Path) -> None:
    save_weights(bare_state_dict(net), path)


def test_saved_weights_replace_the_file_as_a_whole(tmp_path):
    path = tmp_path / "w.pt"
    save(plain_net(1), path)
    os.link(path, tmp_path / "other name.pt")
    save(plain_net(2), path)
    assert equal(torch.load(tmp_path / "other name.pt"), plain_net(1).state_dict())
    assert equal(torch.load(path), plain_net(2).state_dict())
    assert sorted(os.listdir(tmp_path)) == ["other name.pt", "w.pt"]


# -- what others write ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_stripped(prefix, tmp_path):
    weights = plain_net(1).state_dict()
    torch.save({prefix + name: value for name, value in weights.items()}, tmp_path / "w.pt")
    net = plain_net(2)
    load_weights(net, tmp_path / "w.pt")
    assert equal(net.state_dict(), weights)
    wrapped = nn.DataParallel(torch.compile(plain_net(3), backend="eager"))
    load_weights(wrapped, tmp_path / "w.pt")
    assert all(map(torch.equal, wrapped.state_dict().values(), weights.values()))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_model_may_call_its_layers_as_wrappers_do(prefix, tmp_path):
    torch.manual_seed(1)
    weights = Net().state_dict()
    torch.save({prefix + name: value for name, value in weights.items()}, tmp_path / "w.pt")
    net = Net()
    load_weights(net, tmp_path / "w.pt")
    assert equal(net.state_dict(), weights)
    assert equal(bare_state_dict(net), weights)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def truncated(path: Path) -> None:
    save(plain_net(), path)
    path.write_bytes(path.read_bytes()[:-200])


def with_code(path: Path) -> None:
    torch.save({"0.weight": Evil(path.parent / "executed")}, path)


def plain_pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil(path.parent / "executed"), protocol=2))


REFUSED = {
    "no file": (lambda path: None, "no such file"),
    "empty": (lambda path: path.write_bytes(b""), "not a weights file"),
    "text": (lambda path: path.write_text("weights"), "not a weights file"),
    "truncated": (truncated, "not a weights file"),
    "code": (with_code, "not a weights file"),
    "pickle with code": (plain_pickle_with_code, "not a weights file"),
    "a whole module": (lambda path: torch.save(plain_net(), path), "not a weights file"),
    "a tensor": (lambda path: torch.save(torch.zeros(3), path), "holds no state_dict"),
    "a training checkpoint": (lambda path: torch.save({"epoch": 3, "model": {}}, path), "holds no state_dict"),
    "names that are no text": (lambda path: torch.save({1: "x"}, path), "holds no state_dict"),
    "other names": (lambda path: save(Net(), path), "another model: .*not in the file.*not in the model"),
    "less": (lambda path: save(plain_net()[:2], path), "another model: 2.weight, 2.bias not in the file"),
    "more": (lambda path: save(nn.Sequential(*plain_net(), nn.Linear(2, 2)), path), "3.weight, 3.bias not in"),
    "other sizes": (
        lambda path: save(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), path),
        r"2.weight is \(3, 6\) in the file, \(2, 6\) in the model",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(kind, tmp_path):
    make, message = REFUSED[kind]
    make(tmp_path / "w.pt")
    net = plain_net(5)
    with pytest.raises(UserError, match=message):
        load_weights(net, tmp_path / "w.pt")
    assert equal(net.state_dict(), plain_net(5).state_dict())
    assert not (tmp_path / "executed").exists()
