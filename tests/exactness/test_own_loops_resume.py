"""A loop of one's own that was interrupted and continued is, to the bit, the loop that never was."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MeanMetric
from training import Samples, epoch_order, timeless

from dtrain import Ranks
from dtrain.run.folder import RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer.distributed.stop import Stopped

SIZE, BATCH, EPOCHS = 13, 4, 3  # 4 steps an epoch, the last of one sample; 2 batches of validation


@dataclass(frozen=True)
class Options:
    """The loop, and what happens in this process: turns are the batches of both loaders, from 1."""

    random: bool = True  # dropout, and a buffer of each rank's own
    strategy: Literal["ddp", "fsdp"] = "ddp"
    micro_batch_size: int | None = None
    checkpoint_every: int | str = "epoch"
    epochs: int = EPOCHS
    stop_at_turn: int | None = None
    kill_at_turn: int | None = None


def samples(size: int = SIZE) -> Samples:
    torch.manual_seed(size)
    features = torch.randn(size, 4)
    return Samples(features, features[:, :3].argmax(1))


class Drift(nn.Module):
    """Adds what it has seen so far on this rank: a buffer that matters in training."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 0.1 * x.mean().detach()
        return x + self.seen


def new_net(*, random: bool) -> nn.Module:
    torch.manual_seed(5)
    noise = [Drift(), nn.Dropout(0.3)] if random else []
    net = nn.Sequential(nn.Linear(4, 8), *noise, nn.Tanh(), nn.Linear(8, 3))
    net[0].bias.requires_grad_(False)
    return net


def unfreeze(net: nn.Module, epoch: int) -> None:
    """What a run that continues in a later epoch does not do again."""
    if epoch == 2:
        net[0].bias.requires_grad_(True)


def own_loop(rank: int, world_size: int, folder: str, options: Options) -> bool:
    """Whether it came to its end."""
    os.environ["MLFLOW_TRACKING_URI"] = ""
    ranks = Ranks(device="cpu")
    train = ranks.shard(
        DataLoader(samples(), batch_size=BATCH, shuffle=True), micro_batch_size=options.micro_batch_size
    )
    val = ranks.shard(DataLoader(samples(7), batch_size=BATCH))
    net = ranks.wrap(new_net(random=options.random), strategy=options.strategy)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    metrics = ranks.synchronise(
        {"train": MeanMetric(), "val": MeanMetric(), "acc": Accuracy("multiclass", num_classes=3)}
    )
    loss_fn, turns = nn.CrossEntropyLoss(), 0

    def turn() -> None:
        nonlocal turns
        turns += 1
        if turns == options.stop_at_turn and rank == world_size - 1:
            Heartbeat(RunDir(folder).heartbeat(rank)).stop = signal.SIGTERM
        if turns == options.kill_at_turn:
            os.kill(os.getpid(), signal.SIGKILL)

    parts = {"optimizer": optimizer, "scheduler": scheduler}
    every = options.checkpoint_every
    try:
        for epoch in ranks.epochs(
            options.epochs, net=net, checkpoint_every=every, run_dir=folder, resume=True, **parts
        ):
            unfreeze(net, epoch)
            net.train()
            for features, target in train:
                loss = loss_fn(net(features), target)
                ranks.scale_loss(loss).backward()
                if ranks.ends_batch:
                    optimizer.step()
                    optimizer.zero_grad()
                metrics["train"].update(loss.detach(), len(target))
                ranks.log(train_logged=loss, train_twice=(2 * loss.detach(), len(target) * ranks.has_samples))
                turn()
            scheduler.step()  # between two loaders: not once more where the second one continues
            train_loss = metrics["train"].compute()
            metrics["train"].reset()
            net.eval()
            with torch.no_grad():
                for features, target in val:
                    predictions = net(features)
                    metrics["val"].update(loss_fn(predictions, target), len(target))
                    metrics["acc"].update(predictions, target)
                    turn()
            ranks.report(train_loss=train_loss, val_loss=metrics["val"].compute(), val_acc=metrics["acc"].compute())
            metrics["val"].reset()
            metrics["acc"].reset()
    except Stopped:
        return False
    return True


def rows(folder: Path) -> list[dict[str, Any]]:
    return [timeless(row) for row in RunDir(folder).rows()]


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights" / f"{name}.pt", weights_only=True)


def train(folder: Path, *runs: tuple[int, Options]) -> None:
    """Each run in processes of its own, on so many ranks; those but the last one are interrupted."""
    for i, (world_size, options) in enumerate(runs):
        if options.kill_at_turn is not None:
            with pytest.raises(RuntimeError, match="exit code -9"):
                run_ranks(world_size, own_loop, str(folder), options)
        else:
            assert run_ranks(world_size, own_loop, str(folder), options) == [i == len(runs) - 1] * world_size


def plain_loop() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    net, data, val, found = new_net(random=False), samples(), samples(7), []
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    for epoch in range(1, EPOCHS + 1):
        unfreeze(net, epoch)
        total = 0.0
        for chosen in epoch_order(SIZE, 0, epoch).split(BATCH):
            losses = nn.functional.cross_entropy(net(data.features[chosen]), data.target[chosen], reduction="none")
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
            total += losses.sum().item()
        scheduler.step()
        with torch.no_grad():
            predictions = net(val.features)
            loss = nn.functional.cross_entropy(predictions, val.target).item()
        acc = (predictions.argmax(1) == val.target).float().mean().item()
        logged = {"train_logged": total / SIZE, "train_twice": 2 * total / SIZE}
        found.append({"train_loss": total / SIZE, **logged, "val_loss": loss, "val_acc": acc})
    return found, net.state_dict()


# In an epoch 4 turns of training, 2 of validation. A rank's request is heard after the next turn at the latest.
INTERRUPTED = {
    "in training": Options(stop_at_turn=14),
    "at the first batch": Options(stop_at_turn=1),
    "in validation": Options(stop_at_turn=4),
    "at an epoch's end": Options(stop_at_turn=6),
    "killed in training": Options(kill_at_turn=9, checkpoint_every=3),
    "killed in validation": Options(kill_at_turn=11, checkpoint_every=4),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folders of runs that nothing interrupted, by their numbers of ranks and strategies."""
    folders = {}

    def run(world_size: int, strategy: str) -> Path:
        if (world_size, strategy) not in folders:
            folders[world_size, strategy] = tmp_path_factory.mktemp("whole") / "run"
            train(folders[world_size, strategy], (world_size, Options(strategy=strategy)))
        return folders[world_size, strategy]

    return run


@pytest.mark.parametrize(
    ("world_size", "strategy", "how"),
    [
        *((world_size, "ddp", how) for world_size in (1, 2) for how in INTERRUPTED),
        *((2, "fsdp", how) for how in ("in training", "in validation", "killed in training")),
    ],
)
def test_a_continued_loop_has_the_bits_of_one_that_never_stopped(world_size, strategy, how, whole, tmp_path):
    options = Options(strategy=strategy)
    # Those that are stopped are stopped again, after one more batch.
    again = [(world_size, replace(options, stop_at_turn=1))] * (INTERRUPTED[how].stop_at_turn is not None)
    interrupted = replace(INTERRUPTED[how], strategy=strategy)
    train(tmp_path / "run", (world_size, interrupted), *again, (world_size, options))
    uninterrupted = whole(world_size, strategy)
    assert rows(tmp_path / "run") == rows(uninterrupted)
    for name in ("last", "best"):
        for key, value in weights(uninterrupted, name).items():
            assert torch.equal(weights(tmp_path / "run", name)[key], value), key


@pytest.mark.parametrize(
    ("micro_batch_size", "strategies"),
    [(None, ["ddp"] * 3), (1, ["ddp"] * 3), (None, ["fsdp"] * 3), (1, ["ddp", "fsdp", "ddp"])],
)
def test_on_other_numbers_of_ranks_it_is_a_plain_loop(micro_batch_size, strategies, tmp_path):
    """Stopped in training and in validation, with another number of ranks each time; its epochs may become more."""
    options = [Options(random=False, micro_batch_size=micro_batch_size, epochs=2, strategy=each) for each in strategies]
    in_training, in_validation = (1, 2) if micro_batch_size is None else (3, 5)
    train(
        tmp_path / "run",
        (1, replace(options[0], stop_at_turn=in_training)),
        (3, replace(options[1], stop_at_turn=in_validation)),
        (2, replace(options[2], epochs=EPOCHS)),
    )
    expected, state = plain_loop()
    for row, plain in zip(rows(tmp_path / "run"), expected, strict=True):
        assert {name: row[name] for name in plain} == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(weights(tmp_path / "run"), state, rtol=1e-5, atol=1e-6)
