"""Frozen parameters, and those that are unfrozen later, beside a plain loop that sets requires_grad."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from training import Samples, differences, epoch_order, full, prepare

from dtrain import Fsdp, Trainer
from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.trainer import fit_folder
from dtrain.trainer.data.indexed import Source

SAMPLES, BATCH, SEED, STEPS = 20, 7, 3, 9  # three epochs of three steps
FREEZE: list[Any] = [
    {"patterns": ["stem.*"], "until": 4},
    {"patterns": "middle.*", "until": "2 epochs"},
    "base.*",
]


class Net(nn.Module):
    """A base with a batch norm, two layers above it, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        self.stem, self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(torch.tanh(self.stem(self.base(features))))))


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Samples]:
    torch.manual_seed(SEED)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.5)
    return net, optimizer, Samples(torch.randn(SAMPLES, 4), torch.arange(SAMPLES) % 2)


def state_of(net: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights, and the optimizer's state by the names of the parameters."""
    state = {f"{name}.{key}": value for name, own in optimizer["state"].items() for key, value in own.items()}
    return {name: full(value).detach().clone() for name, value in {**net, **state}.items()}


def trained(rank: int, world_size: int, folder: str, strategy: Any) -> list[dict[str, Tensor]]:
    """In one go, and stopped before, at and after the steps at which something is unfrozen."""
    ends = []
    for name, stops in (("whole", [STEPS]), ("parts", [3, 4, 5, 6, STEPS])):
        os.environ[RUN_DIR_VARIABLE] = f"{folder}/{name}"
        for steps in stops:
            net, optimizer, data = parts()
            trainer = Trainer(
                *(net, nn.CrossEntropyLoss(), optimizer),
                **{"freeze": FREEZE, "clip_norm": 1.0, "seed": SEED, "strategy": strategy, "device": "cpu"},
            )
            fit_folder._fits.clear()  # as in another process
            trainer.fit(Source(data, BATCH, shuffle=True), steps=steps)
        assert all(parameter.requires_grad for parameter in trainer.net.parameters())  # as they were
        assert trainer.net.base.training
        ends.append(state_of(trainer.model.state_dict(), trainer.model.optimizer_state(optimizer)))
    return ends


def plain_loop() -> dict[str, Tensor]:
    net, optimizer, data = parts()
    for part in (net.base, net.stem, net.middle):
        part.requires_grad_(False)
    net.base.eval()
    step = 0
    for epoch in (1, 2, 3):
        for chosen in epoch_order(SAMPLES, SEED, epoch).split(BATCH):
            net.stem.requires_grad_(step >= 4)
            net.middle.requires_grad_(epoch > 2)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.features[chosen]), data.target[chosen]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
    names = [name for name, _ in net.named_parameters()]
    state = {names[number]: own for number, own in optimizer.state_dict()["state"].items()}
    return state_of(net.state_dict(), {"state": state})


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [
        ("ddp", 1),
        ("ddp", 2),
        ("ddp", 3),
        (Fsdp(wrap=["Linear"]), 2),
        pytest.param(Fsdp(), 3, marks=pytest.mark.campaign),
    ],
)
def test_what_is_frozen_and_unfrozen_is_trained_as_in_a_plain_loop(tmp_path, strategy, world_size):
    for name in ("whole", "parts"):
        prepare(tmp_path / name, world_size)
    expected = plain_loop()
    assert {name: int(value) for name, value in expected.items() if name.endswith("weight.step")} == {
        **{"stem.weight.step": 5, "middle.weight.step": 3, "head.weight.step": 9}
    }
    for whole, stopped in run_ranks(world_size, trained, str(tmp_path), strategy):
        assert differences(stopped, whole) == []
        assert whole.keys() == expected.keys()  # what is frozen has no state
        for name, value in whole.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda s, n=name: f"{n}: {s}")


def test_norms_in_frozen_parts_stay_in_evaluation_mode_until_they_are_unfrozen(tmp_path):
    net, optimizer, data = parts()
    seen: list[bool] = []
    net.base[1].register_forward_pre_hook(lambda norm, args: seen.append(norm.training))
    trainer = Trainer(
        *(net, nn.CrossEntropyLoss(), optimizer),
        **{"freeze": {"patterns": ["base.0.*", "BatchNorm1d.*"], "until": "1 epoch"}, "device": "cpu"},
    )
    trainer.fit(Source(data, BATCH, shuffle=True), epochs=2, run_dir=tmp_path / "run")
    assert seen == [False] * 3 + [True] * 3
    assert int(net.base[1].num_batches_tracked) == 3


REFUSED = {
    "nothing": ("stem.weigth", "fit.freeze.0.patterns: no parameter is called stem.weigth; did you mean stem.weight"),
    "everything": ("*", "fit.freeze: leaves the first step no parameter to train"),
    "covered": (["base.*", {"patterns": "base.0.*", "until": 3}], "fit.freeze.1: has no effect: the entries before"),
}


@pytest.mark.parametrize(("freeze", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_meant_is_refused(freeze, said):
    net, optimizer, _ = parts()
    with pytest.raises(UserError, match=said):
        Trainer(net, nn.CrossEntropyLoss(), optimizer, freeze=freeze, device="cpu")


def test_an_unfreezing_that_cannot_happen_is_refused_or_warned_of(tmp_path, capsys):
    net, _, data = parts()
    own = torch.optim.SGD(net.head.parameters(), lr=0.1)
    later = {"patterns": "stem.*", "until": "2 epochs"}
    with pytest.raises(UserError, match=r"stem.weight, stem.bias are to be trained later, but the optimizer"):
        Trainer(net, nn.CrossEntropyLoss(), own, freeze=later, device="cpu")
    net, optimizer, _ = parts()
    net.stem.requires_grad_(False)
    with pytest.raises(UserError, match=r"fit.freeze.0: all of stem.weight, stem.bias is frozen already"):
        Trainer(net, nn.CrossEntropyLoss(), optimizer, freeze=later, device="cpu")
    net, optimizer, _ = parts()
    before = net.stem.weight.detach().clone()
    trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, freeze=later, device="cpu")
    trainer.fit(Source(data, BATCH, shuffle=True), epochs=2, run_dir=tmp_path / "run")
    assert "fit.freeze: what is frozen until 2 epochs is never trained: the run ends" in "".join(capsys.readouterr())
    assert torch.equal(net.stem.weight, before)
