"""Ranks.wrap(net, strategy="fsdp"): a loop of one's own trains a model that is cut, and what it can't."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from training import Samples, epoch_order

from dtrain import Fsdp, Ranks
from dtrain.errors import UserError

SIZE, BATCH, EPOCHS = 13, 4, 3


def samples() -> Samples:
    torch.manual_seed(4)
    return Samples(torch.randn(SIZE, 4), torch.randint(3, (SIZE,)))


class Net(nn.Module):
    """Blocks, which are gathered one by one, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, skips: bool = False) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks[skips:]:
            x = block(x)
        return self.last(x)


def new_net() -> Net:
    torch.manual_seed(5)
    return Net()


def evaluating_amid_steps(rank: int, world_size: int, folder: str) -> Any:
    """The model is called at any time, with and without a graph, and changed after that; a part is trained later."""
    ranks = Ranks(device="cpu")
    data = ranks.shard(DataLoader(samples(), batch_size=BATCH, shuffle=True))
    with torch.device("meta" if rank else "cpu"):  # where rank 0 has the values
        net = new_net()
    net = ranks.wrap(net, strategy=Fsdp(wrap=["Sequential"]))
    parts = [parameter.to_local().numel() for parameter in net.parameters() if isinstance(parameter, DTensor)]
    net.first.requires_grad_(False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    scaler, norms = torch.amp.GradScaler("cpu", init_scale=8.0), []
    for epoch in range(1, EPOCHS + 1):
        net.first.requires_grad_(epoch > 1)
        for features, target in data:
            optimizer.zero_grad()
            scaler.scale(ranks.scale_loss(nn.functional.cross_entropy(net(features), target))).backward()
            with torch.no_grad():
                net(features)
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5).full_tensor().item())
            net(features)
            scaler.step(optimizer)
            scaler.update()
    ranks.save(net, Path(folder) / "net.pt")
    return len(parts), sum(parts), norms


def plain_loop() -> tuple[list[float], dict[str, torch.Tensor]]:
    net, data, norms = new_net(), samples(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    for epoch in range(1, EPOCHS + 1):
        net.first.requires_grad_(epoch > 1)
        for chosen in epoch_order(SIZE, 0, epoch).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data.features[chosen]), data.target[chosen]).backward()
            norms.append(nn.utils.clip_grad_norm_(net.parameters(), 0.5).item())
            optimizer.step()
    return norms, net.state_dict()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_loop_with_a_cut_model_is_a_plain_one(world_size, tmp_path):
    norms, weights = plain_loop()
    found = run_ranks(world_size, evaluating_amid_steps, str(tmp_path))
    for tensors, _, its_norms in found:
        assert tensors == len(weights)
        assert its_norms == pytest.approx(norms, rel=1e-5)
    assert sum(numbers for _, numbers, _ in found) == sum(value.numel() for value in weights.values())
    torch.testing.assert_close(torch.load(tmp_path / "net.pt", weights_only=True), weights, rtol=1e-5, atol=1e-6)


def refusals(rank: int, world_size: int) -> list[str]:
    os.environ["MLFLOW_TRACKING_URI"] = ""
    ranks, said = Ranks(device="cpu"), []

    def refused(function: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(UserError) as error:
            function(*args, **kwargs)
        said.append(str(error.value))

    refused(ranks.wrap, new_net(), strategy="deepspeed")
    refused(ranks.wrap, new_net(), strategy=Fsdp(reshard_after_forward=False))
    made_before = torch.optim.Adam((net := new_net()).parameters())
    refused(ranks.wrap, net, strategy="fsdp")
    assert made_before
    data = ranks.shard(DataLoader(samples(), batch_size=BATCH))
    net = ranks.wrap(new_net(), strategy="fsdp")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    refused(ranks.epochs, 2, net=net, optimizer=torch.optim.LBFGS(net.parameters()))
    refused(ranks.epochs, 2, net=net, optimizer=optimizer, head=net.last)

    def train(*, skips: bool) -> None:
        for features, target in data:
            loss = nn.functional.cross_entropy(net(features, skips), target)
            ranks.scale_loss(loss).backward()
            optimizer.step()

    train(skips=False)
    refused(train, skips=True)
    refused(ranks.scale_loss, net.last.weight.square().mean(), 1)
    return said


def test_what_a_cut_model_can_not_have():
    expected = [
        "strategy is 'deepspeed', expected 'ddp', 'fsdp'",
        "leave out reshard_after_forward",
        "make the optimizer of the wrapped model's parameters",
        "LBFGS needs all parameters",
        "head holds parts of a model that fsdp has cut",
        "does not depend on the parameters blocks.0.0.bias, blocks.0.0.weight. fsdp needs all of them in each batch",
        "computed from parameters outside of the model's call",
    ]
    for said in run_ranks(2, refusals):
        for message, each in zip(expected, said, strict=True):
            assert message in each
