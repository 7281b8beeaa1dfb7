"""What batch norm loses when ranks split a batch: accuracies on the digits, by dtrain and by DDP written by hand.

    python bench/batch_norm.py [--batches 4 32] [--ranks 1 2] [--epochs 3]

Batch norm normalises over each rank's share, so a batch of 4 on 2 ranks trains with statistics of 2 samples. Evaluation
uses the running statistics. The accuracy is that of the last epoch on the validation set.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics import Accuracy

from dtrain import Trainer

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "digits"))
from data import digits  # type: ignore[import-not-found]  # of the example, whose folder is on sys.path by now


def parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    blocks = [[nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU()] for width in (64, 128)]
    net = nn.Sequential(nn.Flatten(), *blocks[0], *blocks[1], nn.Linear(128, 10))
    return net, torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def by_dtrain(train: Dataset[Any], val: Dataset[Any], batch: int, epochs: int, folder: Path) -> float:
    net, optimizer = parts()
    metrics = {"acc": Accuracy(task="multiclass", num_classes=10)}
    trainer = Trainer(net, nn.CrossEntropyLoss(), optimizer, metrics, run_dir=folder, device="cpu")
    loaders = (DataLoader(train, batch, shuffle=True, drop_last=True), DataLoader(val, 64))
    return float(trainer.fit(*loaders, epochs=epochs)["val_acc"].iloc[-1])


def by_hand(train: Dataset[Any], val: Dataset[Any], batch: int, epochs: int) -> float:
    net, optimizer = parts()
    ranks = dist.get_world_size()
    sampler = DistributedSampler[Any](train, seed=0, drop_last=True)
    model = DistributedDataParallel(net) if ranks > 1 else net
    loss_fn = nn.CrossEntropyLoss()
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(train, batch // ranks, sampler=sampler, drop_last=True):
            optimizer.zero_grad()
            loss_fn(model(images), labels).backward()
            optimizer.step()
    net.eval()
    with torch.no_grad():
        hits = torch.cat([net(images).argmax(1) == labels for images, labels in DataLoader(val, 64)])
    return float(hits.float().mean())


def measure(batches: list[int], epochs: int, folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    train, val = digits("train"), digits("val")
    for batch in batches:
        hand = by_hand(train, val, batch, epochs)
        ours = by_dtrain(train, val, batch, epochs, folder / str(batch))
        if dist.get_rank() == 0:
            ranks = dist.get_world_size()
            print(f"| {batch} | {ranks} | {batch // ranks} | {ours:.3f} | {hand:.3f} |", flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if "RANK" in os.environ:
        measure(options.batches, options.epochs, options.folder)
        return
    print("| batch | ranks | samples a rank | dtrain | DDP by hand |\n|--|--|--|--|--|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for ranks in options.ranks:
            torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
            rest = (__file__, "--folder", f"{folder}/{ranks}", "--epochs", str(options.epochs), "--batches")
            command = [sys.executable, *torchrun, *rest, *map(str, options.batches)]
            subprocess.run(command, check=True, env={**os.environ, "MLFLOW_TRACKING_URI": ""})


if __name__ == "__main__":
    main()
