"""L1 and L2 regularisation: the gradients of a plain loop whose loss has them, on any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from training import Job, Samples, epoch_order, train

from dtrain import Trainer
from dtrain.errors import UserError
from dtrain.schema.sections import Fsdp
from dtrain.trainer.optimization.regularization import Penalty, penalised

L1, L2 = 0.01, 0.05
SIZE, BATCH, EPOCHS = 26, 8, 2


class Biased(nn.Module):
    """Something with a bias in two dimensions, as tables of relative positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm((6,)), nn.Tanh(), nn.Linear(6, 1))
        self.bias_table = nn.Parameter(torch.ones(1, 4))
        self.plane_norm = nn.LayerNorm((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.layers[:3](x + self.bias_table)
        return self.layers[3](self.plane_norm(hidden.view(-1, 2, 3)).flatten(1))


def parts() -> tuple[nn.Module, torch.optim.Optimizer, Samples]:
    torch.manual_seed(3)
    net = Biased()
    return net, torch.optim.SGD(net.parameters(), lr=0.1), Samples(torch.randn(SIZE, 4), torch.randn(SIZE, 1))


def job(options: dict[str, Any]) -> Job:
    net, optimizer, samples = parts()
    trainer = {"net": net, "loss_fn": nn.MSELoss(), "optimizer": optimizer, "l1": L1, "l2": L2, **options}
    return {"trainer": trainer, "train": samples, "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


def plain_loop(clip_norm: float | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    net, optimizer, samples = parts()
    weights = [net.layers[0].weight, net.layers[3].weight]
    losses = []
    for epoch in range(1, EPOCHS + 1):
        total = 0.0
        for chosen in epoch_order(SIZE, 0, epoch).split(BATCH):
            loss = nn.functional.mse_loss(net(samples.features[chosen]), samples.target[chosen])
            total += loss.item() * len(chosen)
            for weight in weights:
                loss = loss + L1 * weight.abs().sum() + 0.5 * L2 * weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            if clip_norm is not None:
                assert nn.utils.clip_grad_norm_(net.parameters(), clip_norm) > clip_norm
            optimizer.step()
        losses.append(total / SIZE)
    return losses, net.state_dict()


CASES = {
    "one": (1, {}),
    "three": (3, {}),
    "micro-batches": (2, {"micro_batch_size": 1}),
    "clipped": (2, {"clip_norm": 0.3}),
    "fsdp": (2, {"strategy": Fsdp(wrap=["Linear"]), "clip_norm": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_added_once(name, tmp_path):
    ranks, options = CASES[name]
    losses, expected = plain_loop(options.get("clip_norm"))
    for rows, weights in train(ranks, tmp_path / "run", job, options):
        assert [row["train_loss"] for row in rows] == pytest.approx(losses, rel=1e-6)  # the loss's own
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


def test_which_parameters_are_weights():
    net = Biased()
    assert [id(each) for each in penalised(net)] == [id(net.layers[0].weight), id(net.layers[3].weight)]
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert len(list(penalised(tied))) == 1


def test_what_cannot_have_it():
    with pytest.raises(UserError, match="sparse=False"):
        Penalty(nn.Embedding(4, 2, sparse=True), l2=0.1)
    sparse = nn.Embedding(4, 2)
    nn.functional.embedding(torch.tensor([1]), sparse.weight, sparse=True).sum().backward()
    with pytest.raises(UserError, match="sparse=False"):
        Penalty(sparse, l2=0.1).add()
    net = nn.Linear(4, 1)
    for strategy, optimizer, says in (
        ({"zero_optimization": {"stage": 1}}, torch.optim.SGD(net.parameters()), "fit.l1: needs whole weights"),
        ("ddp", torch.optim.LBFGS(net.parameters()), "fit.l1 can't be used with it"),
    ):
        with pytest.raises(UserError, match=says):
            Trainer(net, nn.MSELoss(), optimizer, strategy=strategy, l1=0.1, device="cpu").fit(
                torch.utils.data.DataLoader(Samples(torch.zeros(4, 4), torch.zeros(4, 1)), batch_size=2), epochs=1
            )
