"""Layers that a step leaves out: trained as in one process, or named before anything waits for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from training import Job, Samples, epoch_order, fit, prepare

from dtrain.errors import UserError
from dtrain.schema.sections import Fsdp

EPOCHS, BATCH, SAMPLES, SEED = 2, 7, 20, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x).tanh()


class Net(nn.Module):
    """Leaves the second of three blocks out of a batch on this rank, if `drops` says so by the batch's number."""

    def __init__(self, drops: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head, self.drops, self.batch = nn.Linear(4, 2), drops, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.batch += 1
        for number, block in enumerate(self.blocks):
            if number != 1 or not self.training or not self.drops(self.batch):
                x = block(x)
        return self.head(x)


def make(drops: Any, **options: Any) -> Job:
    torch.manual_seed(SEED)
    net = Net(drops)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.5)
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizer, "seed": SEED, **options}
    data = Samples(torch.randn(SAMPLES, 4), torch.arange(SAMPLES) % 2)
    return {"trainer": trainer, "train": data, "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


def every_second(batch: int) -> bool:
    return batch % 2 == 0


def test_a_layer_that_all_ranks_drop_is_trained_as_in_a_plain_loop(tmp_path):
    """With Adam's state and weight decay, which must rest with it."""
    job = make(every_second)
    net, loss, optimizer = (job["trainer"][name] for name in ("net", "loss_fn", "optimizer"))
    for epoch in range(1, EPOCHS + 1):
        for chosen in epoch_order(SAMPLES, SEED, epoch).split(BATCH):
            optimizer.zero_grad()
            loss(net(job["train"].features[chosen]), job["train"].target[chosen]).backward()
            optimizer.step()
    prepare(tmp_path, 3)
    for _, weights in run_ranks(3, trained, str(tmp_path)):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(weights[name], value)


def trained(rank: int, world_size: int, folder: str) -> Any:
    return fit(rank, world_size, folder, make_allowed)


def make_allowed() -> Job:
    return make(every_second, unused_parameters="allow")


def block_by_block(net: Any, batch: Any) -> Any:
    """A loss for each block, from which is learned before the next."""
    x, target = batch
    for block in net.blocks:
        yield {"loss": nn.functional.cross_entropy(net.head(block(x)), target)}


def make_block_by_block() -> Job:
    job = make(every_second, strategy="fsdp")
    del job["trainer"]["loss_fn"]
    return {**job, "fit": {"epochs": EPOCHS, "step": block_by_block}}


def trained_by_losses(rank: int, world_size: int, folder: str) -> Any:
    return fit(rank, world_size, folder, make_block_by_block)


def test_losses_of_a_step_may_use_a_block_each_under_fsdp(tmp_path):
    job = make(every_second)
    net, optimizer, data = job["trainer"]["net"], job["trainer"]["optimizer"], job["train"]
    for epoch in range(1, EPOCHS + 1):
        for chosen in epoch_order(SAMPLES, SEED, epoch).split(BATCH):
            for result in block_by_block(net, (data.features[chosen], data.target[chosen])):
                optimizer.zero_grad()
                result["loss"].backward()
                optimizer.step()
    prepare(tmp_path, 2)
    for _, weights in run_ranks(2, trained_by_losses, str(tmp_path)):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(weights[name], value)


def refused(rank: int, world_size: int, folder: str, strategy: Any, ranks: tuple[int, ...], first: int) -> None:
    def job() -> Job:
        return make(lambda batch: rank in ranks and batch >= first, strategy=strategy)

    try:
        fit(rank, world_size, folder, job)
    except UserError as error:
        raise RuntimeError(f"said: {error}") from None


ZERO_1, ZERO_3 = ({"zero_optimization": {"stage": stage}} for stage in (1, 3))


@pytest.mark.parametrize(
    ("strategy", "ranks", "first", "said"),
    [
        ("ddp", (0, 1), 2, "the loss of step 2 does not depend on the parameters blocks.1.layer.weight"),
        (Fsdp(), (0, 1), 2, "this step uses other parts than the first one did: blocks.1"),
        (Fsdp(), (1,), 1, "rank 1 goes on to blocks.2 where rank 0 goes on to blocks.1"),
        (Fsdp(), (0,), 2, "this step uses other parts than the first one did: blocks.1"),
        (ZERO_1, (1,), 2, "this step uses other parts than the first one did: blocks.1.layer"),
        (ZERO_3, (0, 1), 1, "the loss of step 1 does not depend on the parameters blocks.1.layer.weight"),
        (ZERO_3, (1,), 1, "rank 1 goes on to blocks.2.layer where rank 0 goes on to blocks.1.layer"),
    ],
)
def test_a_block_that_is_left_out_is_named_and_nothing_hangs(tmp_path, strategy, ranks, first, said):
    """Where each block is gathered by all ranks together, those of them that use it wait for the others."""
    prepare(tmp_path, 2)
    with pytest.raises(RuntimeError, match=r"rank \d failed") as raised:
        run_ranks(2, refused, str(tmp_path), strategy, ranks, first, timeout=60)
    assert f"said: {said}" in str(raised.value)
    assert "fit.unused_parameters: allow" in str(raised.value)
