"""What CUDA may round, by torch's flags: they are the same without a GPU."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.trainer.optimization.precision import Precision
from dtrain.trainer.trainer import Trainer

CPU = torch.device("cpu")
NEWER = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]


def flags() -> dict[str, Any]:
    """By the older names and the newer ones; "mixed" for older ones that torch can't tell."""
    found: dict[str, Any] = {"newer": [each.fp32_precision for each in NEWER]}
    for name, read in {
        "matmul": lambda: torch.backends.cuda.matmul.allow_tf32,
        "cudnn": lambda: torch.backends.cudnn.allow_tf32,
        "precision": torch.get_float32_matmul_precision,
    }.items():
        try:
            found[name] = read()
        except RuntimeError:
            found[name] = "mixed"
    return found


FP32 = {"newer": ["ieee"] * 3, "matmul": False, "cudnn": False, "precision": "highest"}
TF32 = {"newer": ["tf32"] * 3, "matmul": True, "cudnn": True, "precision": "high"}


class Looking(nn.Module):
    """Notes the flags in its forward and its backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.seen: list[dict[str, Any]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(flags())
        found = self.layer(x)
        if found.requires_grad:
            found.register_hook(lambda gradient: self.seen.append(flags()))
        return found


@pytest.fixture
def as_new():
    before = Precision("fp32", CPU)
    with before.in_force():  # it puts back what the test leaves
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = True
        yield
        torch.backends.fp32_precision = "none"


def test_fp32_is_ieee_and_tf32_is_tf32_while_a_trainer_computes(as_new, tmp_path):
    nets = {name: Looking() for name in ("fp32", "tf32")}
    trainers = {
        name: Trainer(
            net,
            nn.CrossEntropyLoss(),
            torch.optim.SGD(net.parameters(), lr=0.1),
            precision=name,
            device="cpu",
            run_dir=tmp_path / name,
        )
        for name, net in nets.items()
    }
    data = DataLoader(TensorDataset(torch.randn(8, 4), torch.tensor([0, 1] * 4)), batch_size=4)
    before = flags()
    for name in ("tf32", "fp32"):  # the one made last comes first
        trainers[name].fit(data, data, epochs=1)
        trainers[name].evaluate(data)
        trainers[name].predict(data)
        assert flags() == before
    assert len(nets["fp32"].seen) > 8
    assert all(seen == FP32 for seen in nets["fp32"].seen)
    assert all(seen == TF32 for seen in nets["tf32"].seen)


@pytest.mark.parametrize(
    "users",
    {
        "as torch begins": lambda: None,
        "older": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        "newer": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "newer, of all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        "newer, of some": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    }.values(),
)
def test_a_users_own_flags_come_back(users, as_new):
    users()
    before = {name: value for name, value in flags().items() if value != "mixed"}
    for name, expected in (("fp32", FP32), ("tf32", TF32)):
        with Precision(name, CPU).in_force():
            assert flags() == expected
        assert {name: flags()[name] for name in before} == before


def test_fp16s_scale_is_where_the_gradients_are():
    """Those offloaded to the CPU must not meet a copy of it that is still on its way."""
    scaler = Precision("fp16", torch.device("cuda"), gradients_on=CPU).scaler
    assert scaler is not None
    scaler.scale(torch.zeros((), device="meta"))  # as the loss on a GPU
    assert scaler._scale is not None
    assert scaler._scale.device == CPU
    net = nn.Linear(2, 1)
    scaler.scale(net(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(torch.optim.SGD(net.parameters(), lr=0.1))
    assert net.weight.grad is not None
    assert net.weight.grad.tolist() == [[1.0, 1.0]]


def test_what_adds_in_any_order_is_left_out(monkeypatch):
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    with patch.dict(os.environ):
        for given, expected in ((None, "^NVLS,NVLSTree"), ("Ring", "Ring")):
            os.environ.pop("NCCL_ALGO", None)
            os.environ.update({} if given is None else {"NCCL_ALGO": given})
            Trainer(nn.Linear(4, 2), nn.MSELoss(), deterministic=True, device="cpu")
            assert os.environ["NCCL_ALGO"] == expected


def test_a_script_that_asks_torch_for_tf32_hears_that_it_gets_none(as_new, capsys):
    Trainer(nn.Linear(4, 2), nn.MSELoss(), device="cpu")
    assert "TF32" not in capsys.readouterr().err
    torch.set_float32_matmul_precision("high")
    Trainer(nn.Linear(4, 2), nn.MSELoss(), device="cpu", precision="bf16")
    assert "TF32" not in capsys.readouterr().err
    Trainer(nn.Linear(4, 2), nn.MSELoss(), device="cpu")
    assert "this script allows TF32, which precision fp32 overrides" in capsys.readouterr().err
