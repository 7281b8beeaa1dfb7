"""Optimizers that want more of a loop than `step()`: what a plain loop does for them, on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, TensorDataset
from training import prepare

from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.schema.sections import Fsdp
from dtrain.trainer import fit_folder
from dtrain.trainer.checks.optimizer_kinds import judged
from dtrain.trainer.trainer import Trainer

EPOCHS, BATCH = 3, 8


class ScheduleFree(Optimizer):
    """Trains between two sequences of weights, and is judged by their average: after `eval`, before `train`."""

    def __init__(self, params: Any, lr: float = 0.1, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "steps": 0, "trains": False})

    def _turn(self, trains: bool) -> None:
        for group in self.param_groups:
            if group["trains"] != trains:
                group["trains"] = trains
                for p in (p for p in group["params"] if p in self.state):
                    p.data.lerp_(self.state[p]["z"], 1 - group["beta"] if trains else 1 - 1 / group["beta"])

    def train(self) -> None:
        self._turn(True)

    def eval(self) -> None:
        self._turn(False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["trains"]
            group["steps"] += 1
            share = 1 / group["steps"]
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, share).sub_(p.grad, alpha=group["lr"] * (1 - group["beta"] * (1 - share)))
                z.sub_(p.grad, alpha=group["lr"])


class Sharpness(Optimizer):
    """Goes uphill, has the closure make the gradient there, and leaves the step to another optimizer."""

    def __init__(self, params: Any, rho: float = 0.5) -> None:
        super().__init__(params, {"rho": rho, "lr": 0.1})
        self.base = SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["before"] = p.detach().clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / norm))

    @torch.no_grad()
    def second_step(self) -> None:
        for p, state in self.state.items():
            p.copy_(state["before"])
        self.base.step()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is not None
        self.first_step()
        closure()
        self.second_step()


class Twice(SGD):
    """Has no gradient but the closure's."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> None:  # type: ignore[override]
        for _ in range(2):
            closure()
            super().step()


class Insists(SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("this optimizer requires a closure")


KINDS: dict[str, Callable[..., Any]] = {"schedule-free": ScheduleFree, "sharpness": Sharpness}
KINDS["closure"] = lambda parameters: Twice(parameters, lr=0.1)


def parts(kind: str) -> tuple[nn.Module, Any, DataLoader[Any]]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    samples = TensorDataset(torch.randn(26, 4), torch.randn(26, 1))
    return net, KINDS[kind](net.parameters()), DataLoader(samples, batch_size=BATCH)


def plain_loop(kind: str) -> tuple[list[list[float]], torch.Tensor]:
    net, optimizer, loader = parts(kind)
    rows = []
    for _ in range(EPOCHS):
        total, has_modes = 0.0, kind == "schedule-free"
        if has_modes:
            optimizer.train()
        for features, target in loader:
            losses = []

            @torch.enable_grad()
            def closure(features=features, target=target, losses=losses) -> torch.Tensor:
                optimizer.zero_grad()
                losses.append(nn.functional.mse_loss(net(features), target))
                losses[-1].backward()
                return losses[-1]

            if kind != "closure":
                closure()
            optimizer.step() if has_modes else optimizer.step(closure)
            total += losses[0].item() * len(features)
        if has_modes:
            optimizer.eval()
        whole = nn.functional.mse_loss(net(loader.dataset.tensors[0]), loader.dataset.tensors[1])
        rows.append([total / 26, whole.item()])
    return rows, net[0].weight.detach()


def trained(rank: int, world_size: int, folder: str, strategy: Any = "ddp") -> dict[str, Any]:
    found = {}
    for kind in KINDS:
        weights = []
        for name, lengths in (("straight", [EPOCHS]), ("continued", [EPOCHS - 1, EPOCHS])):
            run = RunDir(f"{folder}/{kind}-{name}")
            os.environ[RUN_DIR_VARIABLE] = str(run)
            for epochs in lengths:
                fit_folder._fits.clear()  # as in another process
                net, optimizer, loader = parts(kind)
                trainer = Trainer(*(net, nn.MSELoss(), optimizer), device="cpu", micro_batch_size=3, strategy=strategy)
                rows = trainer.train(loader, loader, epochs=epochs).progress.rows
            weights.append(torch.load(run.last_weights)["0.weight"])
            own = trainer.model.weights().get("0.weight")
            assert rank > 0 or torch.equal(weights[-1], own)  # the model is left as it was saved
        found[kind] = [[row["train_loss"], row["val_loss"]] for row in rows], *weights
    return found


@pytest.mark.parametrize(("world_size", "strategy"), [(3, "ddp"), (2, Fsdp())])
def test_a_plain_loop_is_reproduced_and_a_run_continues_to_the_bit(world_size, strategy, tmp_path):
    expected = {kind: plain_loop(kind) for kind in KINDS}
    for kind in KINDS:
        for name in ("straight", "continued"):
            prepare(tmp_path / f"{kind}-{name}", world_size)
    for found in run_ranks(world_size, trained, str(tmp_path), strategy):
        for kind, (rows, straight, continued) in found.items():
            torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected[kind][0]), rtol=1e-5, atol=0)
            torch.testing.assert_close(straight, expected[kind][1], rtol=1e-5, atol=1e-6)
            assert torch.equal(straight, continued)


def test_after_an_evaluation_the_weights_are_those_of_before_to_the_bit():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = ScheduleFree(net.parameters())
    optimizer.train()
    for _ in range(5):
        optimizer.zero_grad()
        net(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
    before = net[0].weight.detach().clone()
    with judged(optimizer):
        assert not torch.allclose(net[0].weight, before)
    assert torch.equal(net[0].weight, before)
    optimizer.eval(), optimizer.train()
    assert not torch.equal(net[0].weight, before)  # its own way back rounds


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Insists, {}, "Insists.step needs a closure, but its signature doesn't show it .*def step"),
        (Twice, {"clip_norm": 1.0}, "Twice computes the gradient several times a step, so fit.clip_norm"),
        (Twice, {"strategy": {"zero_optimization": {"stage": 1}}}, "Twice needs a closure, or .*: use ddp"),
    ],
)
def test_what_can_not_be_kept_is_refused(kind, options, message, tmp_path, monkeypatch):
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(prepare(tmp_path / "run", 1)))
    net, _, loader = parts("closure")
    with pytest.raises(UserError, match=message):
        Trainer(net, nn.MSELoss(), kind(net.parameters(), lr=0.1), device="cpu", **options).fit(loader)
