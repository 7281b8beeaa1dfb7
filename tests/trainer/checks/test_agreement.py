"""What ranks are given must be the same on all of them: what differs is named before the first step."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from dtrain import Ranks
from dtrain.errors import UserError
from dtrain.trainer.trainer import Trainer

SIZE = 12
WHOLE = TensorDataset(torch.arange(SIZE * 4.0).view(SIZE, 4), torch.zeros(SIZE, dtype=torch.long))


class Holder(Dataset):
    """Samples by what it is given; reading them here would be wrong."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("a sample is read")


def files(rank: int) -> list[str]:
    names = [f"/data/{i:03}.png" for i in range(100)]
    return names if rank == 0 else names[::-1]


# What a rank makes, and what of it is named.
DIFFERENT: dict[str, tuple[Callable[[int], Any], str]] = {
    "an unseeded split": (
        lambda rank: Subset(WHOLE, torch.randperm(8, generator=torch.Generator().manual_seed(rank)).tolist()),
        r"Subset.indices is \[\d, \d, \d, ...\] of 8 on rank 0, \[\d, \d, \d, ...\] of 8 on rank 1; .*random splits",
    ),
    "files in another order": (
        lambda rank: Holder(files=files(rank)),
        r"Holder.files is \['/data/000.png', .*\['/data/099.png', .*sort listed files",
    ),
    "labels": (lambda rank: Holder(samples=[(f"{i}.png", i * rank) for i in range(9)]), "Holder.samples"),
    "one label of many": (lambda rank: Holder(a=[0] * 70 + [rank] + [0] * 70), "another one with the same beginning"),
    "a part of several": (
        lambda rank: ConcatDataset([WHOLE, Subset(WHOLE, range(rank, rank + 5))]),
        r"ConcatDataset.datasets\[1\].indices",
    ),
    "a dataset within": (lambda rank: Holder(base=Holder(index=np.arange(9) + rank)), "Holder.base.index"),
    "an index": (lambda rank: Holder(by_name={i: f"{i + rank}" for i in range(9)}), "Holder.by_name"),
    "values": (lambda rank: TensorDataset(torch.full((SIZE, 2), rank)), r"TensorDataset.tensors\[0\]|.tensors"),
    "length": (lambda rank: Subset(WHOLE, range(9 + rank)), "samples is 9 on rank 0, 10 on rank 1"),
    "a class": (lambda rank: WHOLE if rank else Holder(), "Holder is Holder on rank 0, missing on rank 1"),
    "batch size": (lambda rank: DataLoader(WHOLE, batch_size=4 + rank), "batch_size is 4 on rank 0, 5 on rank 1"),
    "shuffle": (lambda rank: DataLoader(WHOLE, 4, shuffle=rank == 1), "shuffle is False on rank 0, True on rank 1"),
}
ALIKE: dict[str, Callable[[int], Any]] = {
    "what is a rank's own": lambda rank: Holder(
        rank=rank,
        device=torch.device("cuda", rank),
        folder=f"/scratch/{rank}",
        local_ranks=[rank],
        settings={"rank": rank, "seed": rank},
        lock=threading.Lock(),
        generator=torch.Generator().manual_seed(rank),
        rng=np.random.default_rng(rank),
        transform=nn.Linear(1, 1),
        cache={str(rank): rank},
    ),
    "folders": lambda rank: Holder(
        files=[f"/scratch/{rank}/{i}" for i in range(9)], samples=[(f"/scratch/{rank}/{i}/a", i) for i in range(9)]
    ),
    "sets and dicts in their own order": lambda rank: Holder(
        names=set("abcdef"), index=dict(sorted(((i, i) for i in range(99)), reverse=rank == 1))
    ),
    "a stream's loader": lambda rank: iter([(torch.full((2, 4), float(rank)), torch.zeros(2, dtype=torch.long))]),
    "loading processes": lambda rank: DataLoader(WHOLE, batch_size=4, num_workers=rank),
}


def refused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except UserError as error:
        return str(error)
    return ""


def of_data(rank: int, world_size: int) -> dict[str, str]:
    ranks = Ranks(device="cpu")
    made = {name: make(rank) for name, (make, _) in DIFFERENT.items()}
    made |= {name: make(rank) for name, make in ALIKE.items()}
    loaders = {
        name: DataLoader(each, batch_size=4) if isinstance(each, Dataset) else each for name, each in made.items()
    }
    found = {name: refused(ranks.shard, loader) for name, loader in loaders.items()}
    keeper = Holder(read={})
    found["before reading"] = refused(ranks.shard, DataLoader(keeper))
    keeper.read[rank] = "a sample of this rank's share"
    found["after reading"] = refused(ranks.shard, DataLoader(Subset(keeper, range(3))))
    return found


def test_datasets_that_differ_are_named_on_all_ranks():
    first, *others = run_ranks(2, of_data)
    assert all(found == first for found in others)
    alike = [*ALIKE, "before reading", "after reading"]
    assert {name: first[name] for name in alike} == dict.fromkeys(alike, "")
    for name, (_, message) in DIFFERENT.items():
        with pytest.raises(UserError, match=f"^the dataset differs between ranks: .*{message}"):
            raise UserError(first[name])


def bias_frozen(net: nn.Linear, is_frozen: bool) -> nn.Linear:
    net.bias.requires_grad_(not is_frozen)
    return net


def of_the_rest(rank: int, world_size: int, folder: str, capture: str) -> dict[str, str]:
    os.environ["MLFLOW_TRACKING_URI"] = ""
    last = rank == world_size - 1

    def fit(**changes: Any) -> None:
        torch.manual_seed(changes.pop("weights", 0))
        net = changes.pop("net", None) or nn.Linear(4, 2)
        lr, epochs = changes.pop("lr", 0.1), changes.pop("epochs", 1)
        trainer = Trainer(
            net,
            changes.pop("loss", nn.CrossEntropyLoss()),
            torch.optim.SGD(net.parameters(), lr=lr),
            run_dir=f"{folder}/{time.monotonic_ns()}",
            device="cpu",
            **changes,
        )
        trainer.fit(DataLoader(WHOLE, batch_size=4), epochs=epochs)

    found = {
        "lr": refused(fit, lr=0.1 + last),
        "epochs": refused(fit, epochs=1 + last),
        "clip_norm": refused(fit, clip_norm=1.0 if last else None),
        "loss": refused(fit, loss=nn.CrossEntropyLoss(label_smoothing=0.5 * last)),
        "shape": refused(fit, net=nn.Linear(4, 2 + last)),
        "layer": refused(fit, net=nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5 * last))),
        "frozen": refused(fit, net=bias_frozen(nn.Linear(4, 2), last)),
    }
    with Path(capture.format(rank)).open("w") as file, contextlib.redirect_stderr(file):
        fit(weights=rank)
    return found


def test_other_parts_that_differ_are_named_and_other_weights_warned_of(tmp_path):
    first, *others = run_ranks(3, of_the_rest, str(tmp_path), str(tmp_path / "{}.txt"))
    assert all(found == first for found in others[:-1])
    expected = {
        "lr": r"what the ranks were given differs between ranks: optimizer.lr is 0.1 on rank 0, 1.1 on rank 2",
        "epochs": "epochs is 1 on rank 0, 2 on rank 2",
        "clip_norm": "clip_norm is None on rank 0, 1.0 on rank 2",
        "loss": "loss.label_smoothing is 0.0 on rank 0, 0.5 on rank 2",
        "shape": r"the model differs between ranks: .*out_features=2.* on rank 0, .*out_features=3.* on rank 2",
        "layer": r"the model differs between ranks: 1 is 'Dropout\(p=0.0.*",
        "frozen": "the model differs between ranks: bias is .* frozen' on rank 2",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            raise UserError(first[name])
    warnings = [(tmp_path / f"{rank}.txt").read_text().count("the model's weights differ") for rank in range(3)]
    assert warnings == [1, 0, 0]
