"""What DDP needs of a model, said before the first backward pass."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset
from training import Job, Samples, differences, fit, prepare, train

from dtrain.trainer.strategies.base import reached_leaves


class WithSpare(nn.Module):
    """A layer more than it uses."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(not frozen)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.used(features)


def spare_job(frozen: bool) -> Job:
    torch.manual_seed(0)
    net = WithSpare(frozen)
    data = Samples(torch.randn(20, 4), torch.arange(20) % 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizer}
    return {"trainer": trainer, "train": data, "batch_size": 8, "fit": {"epochs": 1}}


def outcome(rank: int, world_size: int, folder: str, frozen: bool) -> str:
    try:
        fit(rank, world_size, folder, spare_job, frozen)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def test_unused_parameters_are_named_on_all_ranks(tmp_path):
    prepare(tmp_path, 2)
    for said in run_ranks(2, outcome, str(tmp_path), False):
        assert said.startswith("UserError: the loss does not depend on the parameters spare.weight, spare.bias")


@pytest.mark.parametrize(("world_size", "frozen"), [(1, False), (2, True)])
def test_unused_parameters_that_do_no_harm(tmp_path, world_size, frozen):
    prepare(tmp_path, world_size)
    assert run_ranks(world_size, outcome, str(tmp_path), frozen) == ["trained"] * world_size


def test_leaves_hidden_by_reentrant_checkpointing_are_not_missed():
    layer = nn.Linear(2, 2)
    features = torch.randn(3, 2, requires_grad=True)
    assert {id(layer.weight), id(layer.bias)} < reached_leaves(layer(features).sum())
    assert reached_leaves(checkpoint(layer, features, use_reentrant=True).sum()) is None


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(10, 4, sparse=True), nn.Linear(4, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.last(self.words(features).mean(1))


def words_job(epochs: int) -> Job:
    torch.manual_seed(0)
    net = Words()
    data = TensorDataset(torch.arange(60).view(20, 3) % 10, torch.arange(20) % 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)  # whose state is sparse too
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizer}
    return {"trainer": trainer, "train": data, "batch_size": 7, "fit": {"epochs": epochs}}


def test_sparse_gradients(tmp_path):
    alone, *_ = train(1, tmp_path / "1", words_job, 2)
    whole, *_ = train(3, tmp_path / "whole", words_job, 2)
    train(3, tmp_path / "3", words_job, 1)
    for rows, weights in train(3, tmp_path / "3", words_job, 2):
        assert differences(weights, whole[1]) == []
        assert [row["train_loss"] for row in rows] == pytest.approx([row["train_loss"] for row in alone[0]], rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, alone[1][name])
