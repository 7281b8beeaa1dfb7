"""Parameters and buffers wherever they are, at 1 to 3 ranks, beside a plain loop."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import Job, Samples, differences, epoch_order, full, prepare

from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.schema.loading import load_job
from dtrain.schema.sections import Fsdp
from dtrain.trainer import fit_folder
from dtrain.trainer.checks.arguments import require_model
from dtrain.trainer.data.indexed import Source
from dtrain.trainer.distributed.world import World, join_world
from dtrain.trainer.entrypoints.train import build_model
from dtrain.trainer.model.learned_loss import LearnedLoss
from dtrain.trainer.model.loading import load_weights
from dtrain.trainer.model.modes import begin_training, evaluation_mode
from dtrain.trainer.model.weights import save_weights
from dtrain.trainer.optimization.ema import Ema
from dtrain.trainer.strategies.fsdp import FullySharded
from dtrain.trainer.trainer import Strategy, Trainer

BATCH, EPOCHS, SAMPLES, SEED = 7, 2, 20, 3


class Centres(nn.Module):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(2, 3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.calls += 1
        return ((predictions - self.centres[target]) ** 2).sum(1).mean()


class Odd(nn.Module):
    """Complex, empty, 0-dim, float64 and whole-number parameters, a frozen batch norm, a cache that grows, a log."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.aux = nn.Linear(4, 3), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3).requires_grad_(False).eval()
        self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.zeros(0))
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.codes = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("cache", torch.zeros(0, 3))
        self.register_buffer("later", None)
        self.log: dict[str, Any] = {"batches": [], "sums": {}}

    def get_extra_state(self) -> Any:
        return self.log

    def set_extra_state(self, state: Any) -> None:
        self.log = state

    def forward(self, features: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.log["batches"].append(len(self.log["batches"]))
            self.log["sums"]["last"] = features[:, :1].detach()
        if len(self.cache) < 3:
            self.cache = torch.cat([self.cache, torch.ones(1, 3)])
            self.later = torch.arange(len(self.cache))
        hidden = self.norm(self.first(features)) * (self.phase * self.phase.conj()).real
        hidden = hidden * self.scale.float() + self.empty.sum()
        chosen = (features[:, :1] > 0).float()
        if chosen.any():  # in some batches, on some ranks
            hidden = hidden + chosen * self.aux(features)
        return hidden


def job() -> Job:
    torch.manual_seed(SEED)
    net, loss = Odd(), Centres()
    optimizer = torch.optim.AdamW([*net.parameters(), *loss.parameters()], lr=0.05, weight_decay=0.5)
    features = torch.randn(SAMPLES, 4)
    features[:, 0] = -1.0
    features[:2, 0] = 1.0
    data = Samples(features, torch.arange(SAMPLES) % 2)
    trainer = {"net": net, "loss_fn": loss, "optimizer": optimizer, "seed": SEED, "clip_norm": 1.0, "ema": 0.5}
    return {"trainer": trainer, "train": data}


def state_of(net: nn.Module, loss: nn.Module) -> dict[str, Tensor]:
    named = {**net.state_dict(), **{f"loss.{name}": value for name, value in loss.state_dict().items()}}
    log = named.pop("_extra_state")
    named |= {"log": torch.tensor(log["batches"]), "log of features": log["sums"]["last"]}
    return {name: value.clone() for name, value in named.items()}


def trained(rank: int, world_size: int, folder: str) -> list[dict[str, Tensor]]:
    """In one go, and in two processes' worth of parts."""
    ends = []
    for name, parts in (("whole", [EPOCHS]), ("parts", [1, EPOCHS])):
        os.environ[RUN_DIR_VARIABLE] = f"{folder}/{name}"
        for epochs in parts:
            made = job()
            trainer = Trainer(**made["trainer"], device="cpu", unused_parameters="allow")
            fit_folder._fits.clear()  # as in another process
            trainer.fit(Source(made["train"], BATCH, shuffle=True), Source(made["train"], BATCH, False), epochs=epochs)
        assert not trainer.net.norm.training
        assert trainer.net.first.training
        ends.append(state_of(trainer.net, made["trainer"]["loss_fn"]))
    return ends


def plain_loop() -> dict[str, Tensor]:
    made = job()
    net, loss, optimizer = (made["trainer"][name] for name in ("net", "loss_fn", "optimizer"))
    for epoch in range(1, EPOCHS + 1):
        for chosen in epoch_order(SAMPLES, SEED, epoch).split(BATCH):
            optimizer.zero_grad()
            loss(net(made["train"].features[chosen]), made["train"].target[chosen]).backward()
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
            optimizer.step()
    return state_of(net, loss)


def test_any_parameters_and_buffers_as_in_a_plain_loop(tmp_path):
    expected = plain_loop()
    for world_size in (1, 3):
        for name in ("whole", "parts"):
            prepare(tmp_path / f"{world_size}" / name, world_size)
        for whole, parts in run_ranks(world_size, trained, str(tmp_path / f"{world_size}")):
            for name, value in whole.items():
                torch.testing.assert_close(parts[name], value, rtol=0, atol=0)
                if name not in ("loss.calls", "later", "log of features"):
                    torch.testing.assert_close(value, expected[name], msg=lambda said, n=name: f"{n}: {said}")
    beside = torch.load(tmp_path / "3" / "whole" / "weights" / "last.loss.pt", weights_only=True)
    torch.testing.assert_close(beside["centres"], expected["loss.centres"])
    net = Odd()
    load_weights(net, tmp_path / "3" / "whole" / "weights" / "last.pt")
    assert net.log["batches"] == expected["log"].tolist()
    torch.testing.assert_close(net.log["sums"]["last"], whole["log of features"])


class Own:
    pass


def test_weights_whose_loss_is_not_beside_them_are_not_evaluated(tmp_path):
    world = World(0, 1, torch.device("cpu"))
    loss, constant = LearnedLoss(Centres(), nn.Linear(4, 3), world), LearnedLoss(nn.MSELoss(), nn.Linear(4, 3), world)
    constant.load(tmp_path / "best.pt")  # there is nothing to be beside them
    with pytest.raises(UserError, match=r"best\.loss\.pt is missing, and with it calls, centres of the loss, learned"):
        loss.load(tmp_path / "best.pt")
    torch.save({"calls": torch.tensor(7)}, tmp_path / "best.loss.pt")
    with pytest.raises(UserError, match=r"best\.loss\.pt lacks centres of the loss"):
        loss.load(tmp_path / "best.pt")
    torch.save({"calls": torch.tensor(7), "centres": torch.ones(2, 3)}, tmp_path / "best.loss.pt")
    loss.load(tmp_path / "best.pt")
    assert (int(loss.module.calls), float(loss.module.centres.detach().sum())) == (7, 6.0)


class Sometimes(nn.Module):
    """Leaves a layer out from the third batch on, on the last rank alone."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.main, self.aux, self.calls, self.rank = nn.Linear(4, 2), nn.Linear(4, 2), 0, rank

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        return self.main(features) + (self.aux(features) if self.calls < 3 or self.rank == 0 else 0.0)


def refusal(rank: int, world_size: int, folder: str, strategy: Strategy) -> str:
    os.environ[RUN_DIR_VARIABLE] = folder
    torch.manual_seed(0)
    net = Sometimes(rank)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    given = DistributedDataParallel(net) if strategy == "ddp" else net
    trainer = Trainer(given, nn.CrossEntropyLoss(), optimizer, device="cpu", strategy=strategy)
    data = Samples(torch.randn(24, 4), torch.arange(24) % 2)
    try:
        trainer.fit(Source(data, 8, shuffle=True), epochs=2)
    except UserError as error:
        raise RuntimeError(f"said: {error}") from None
    return "trained"


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("ddp", "the loss of step 3 does not depend on the parameters aux.weight, aux.bias"),
        (Fsdp(), "step 3 uses other parameters than the first one did on rank 0: aux.bias, aux.weight"),
    ],
)
def test_a_parameter_that_a_later_step_leaves_out_is_named(tmp_path, strategy, said):
    prepare(tmp_path, 2)
    with pytest.raises(RuntimeError, match="rank 1 failed") as raised:
        run_ranks(2, refusal, str(tmp_path), strategy)
    assert f"said: {said}" in str(raised.value)
    assert "fit.unused_parameters: allow" in str(raised.value)


def never_used(rank: int, world_size: int) -> dict[str, float]:
    """How far two steps move each parameter."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"main": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    model = FullySharded(net, join_world("cpu"), Fsdp(), None)
    model.adopt(optimizer)
    before = {name: full(p).clone() for name, p in net.named_parameters()}
    for step in (1, 2):
        loss = model.module(lambda net: net["main"](torch.ones(3, 2)).sum())
        loss.backward()
        model.require_averaged(loss, step)
        optimizer.step()
        optimizer.zero_grad()
    return {name: float((full(p) - before[name]).abs().max()) for name, p in net.named_parameters()}


def test_fsdp_leaves_alone_what_no_rank_uses():
    for moved in run_ranks(2, never_used):
        assert moved["main.weight"] > 0.1
        assert moved["other.weight"] == moved["other.bias"] == 0


def test_what_no_optimizer_and_no_model_has(tmp_path, capsys):
    net, loss = nn.Linear(4, 3), Centres()
    Trainer(net, loss, torch.optim.SGD(net.parameters(), lr=0.1), device="cpu")
    assert "the loss's parameters centres are not trained" in "".join(capsys.readouterr())
    stranger = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match="1 of its parameters belong neither to the model nor to the loss"):
        Trainer(net, loss, torch.optim.SGD([*net.parameters(), stranger], lr=0.1), device="cpu")


LAZY = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Dropout(), nn.LazyLinear(2))

def data():
    return torch.utils.data.TensorDataset(torch.rand(8, 4), torch.zeros(8).long())

def step(model, batch):
    predictions = model(batch[0])
    return {"loss": predictions.sum() if model.training else {}["in training alone"]}
"""
LAZY_JOB = """
name: lazy
seed: 5
model: {_target_: lazy_parts.Net}
data: {train: {_target_: lazy_parts.data}, batch_size: 4}
step: {_target_: lazy_parts.step}
optimizer: {_target_: torch.optim.SGD, lr: 0.1}
fit: {epochs: 1}
"""


def test_a_jobs_data_give_shapes(tmp_path, monkeypatch):
    (tmp_path / "lazy_parts.py").write_text(LAZY)
    (tmp_path / "job.yaml").write_text(LAZY_JOB)
    monkeypatch.syspath_prepend(tmp_path)
    job = load_job(tmp_path / "job.yaml").job
    net = build_model(job, None)
    torch.manual_seed(5)
    expected = importlib.import_module("lazy_parts").Net()
    expected.eval()(torch.ones(2, 4))
    assert differences(net.state_dict(), expected.state_dict()) == []
    assert net.training
    save_weights(net.state_dict(), tmp_path / "last.pt")
    assert differences(build_model(job, tmp_path / "last.pt").state_dict(), net.state_dict()) == []


class Stateful(nn.Linear):
    state: Any = None

    def get_extra_state(self) -> Any:
        return {"calls": self.state}


class Settable(Stateful):
    def set_extra_state(self, state: Any) -> None:
        self.state = state["calls"]


def holding(state: Any) -> nn.Module:
    net = Settable(2, 2)
    net.state = state
    return nn.Sequential(net)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (nn.Sequential(nn.LazyLinear(3)), "0.weight has no shape before the first batch"),
        (nn.Sequential(nn.LazyBatchNorm1d(affine=False)), "0.running_mean has no shape before the first batch"),
        (nn.Sequential(nn.DataParallel(nn.Linear(2, 2))), "DataParallel already wraps it"),
        (nn.Sequential(Stateful(2, 2)), "Stateful has get_extra_state but no set_extra_state"),
        (holding(Own()), "a checkpoint can't hold 0._extra_state/calls: it is a Own.*get_extra_state may return"),
        (holding(np.ones(2)), "0._extra_state is not plain data: loading a weights file"),
    ],
)
def test_models_that_are_refused(net, said):
    with pytest.raises(UserError, match=said):
        require_model(net)


def test_modes_are_those_that_the_user_has_set():
    net = nn.Sequential(nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)), nn.Dropout())
    net[0].eval()
    begin_training(net)
    with evaluation_mode(net):
        assert not any(module.training for module in net.modules())
    assert [module.training for module in net.modules()] == [True, False, False, False, True]
    net.eval()  # left so by what came before
    begin_training(net)
    assert all(module.training for module in net.modules())


def test_whole_numbers_are_not_averaged():
    net = Odd()
    average = Ema(net, 0.5)
    average.update()
    assert "codes" not in average.state_dict()
    assert average.state_dict()["phase"].is_complex()
