"""One small training, written as a bare loop, for dtrain, and for each peer as its documentation advises.

Each trains an epoch on batches that lie in memory, with the mean loss and one accuracy. What a peer does beside that by
default (progress bars, loggers, checkpoints) is turned off where it has a setting for it; dtrain keeps all of it on.
Peers are imported where they are used: one that is not installed is left out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Accuracy

from dtrain import Trainer

CLASSES = 10

Batch = tuple[Tensor, Tensor]


@dataclass
class Parts:
    """What is trained, and on what. The loops make their own accuracy: not all of them take torchmetrics'."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Batch]  # whole ones, over all ranks
    folder: Path

    @property
    def own_batches(self) -> list[Batch]:
        """This rank's shares of them."""
        if not dist.is_initialized():
            return self.batches
        ranks, rank = dist.get_world_size(), dist.get_rank()
        return [(features.chunk(ranks)[rank], target.chunk(ranks)[rank]) for features, target in self.batches]

    @property
    def model(self) -> nn.Module:
        return DistributedDataParallel(self.net) if dist.is_initialized() else self.net


class Ready(list[Batch]):
    """Batches as one loader: Lightning takes a list for several, and torchkeras notes its size there."""

    size: int


def accuracy() -> Any:
    """torchmetrics' class for this task, in which its stub does not see an `update`."""
    return Accuracy(task="multiclass", num_classes=CLASSES)


def bare(parts: Parts) -> None:
    """Nothing but the training."""
    model, optimizer, loss_fn = parts.model, parts.optimizer, nn.CrossEntropyLoss()
    for features, target in parts.own_batches:
        optimizer.zero_grad()
        loss_fn(model(features), target).backward()
        optimizer.step()


def bare_with_metric(parts: Parts) -> None:
    """With torchmetrics' accuracy and a sum of the losses, neither of which waits for a device."""
    model, optimizer, loss_fn, metric = parts.model, parts.optimizer, nn.CrossEntropyLoss(), accuracy()
    total = torch.zeros(())
    for features, target in parts.own_batches:
        optimizer.zero_grad()
        predictions = model(features)
        loss = loss_fn(predictions, target)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        metric.update(predictions.detach(), target)


def bare_with_items(parts: Parts) -> None:
    """As torch's own tutorials count, by `.item()`."""
    model, optimizer, loss_fn = parts.model, parts.optimizer, nn.CrossEntropyLoss()
    total = correct = 0.0
    for features, target in parts.own_batches:
        optimizer.zero_grad()
        predictions = model(features)
        loss = loss_fn(predictions, target)
        loss.backward()
        optimizer.step()
        total += loss.item()
        correct += (predictions.argmax(1) == target).float().sum().item()


def bare_with_forward(parts: Parts) -> None:
    """As torchmetrics' own guide begins, by calling the metric, which gives each batch's accuracy too."""
    model, optimizer, loss_fn, metric = parts.model, parts.optimizer, nn.CrossEntropyLoss(), accuracy()
    total = 0.0
    for features, target in parts.own_batches:
        optimizer.zero_grad()
        predictions = model(features)
        loss = loss_fn(predictions, target)
        loss.backward()
        optimizer.step()
        total += loss.item()
        metric(predictions.detach(), target)


def dtrain(parts: Parts) -> None:
    metrics = {"acc": accuracy()}
    trainer = Trainer(parts.net, nn.CrossEntropyLoss(), parts.optimizer, metrics, run_dir=parts.folder, device="cpu")
    trainer.fit(parts.batches, epochs=1)


def ignite(parts: Parts) -> None:
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Accuracy, Average

    def output(x: Tensor, y: Tensor, predictions: Tensor, loss: Tensor) -> dict[str, Tensor]:
        return {"y_pred": predictions, "y": y, "loss": loss}

    engine = create_supervised_trainer(parts.net, parts.optimizer, nn.CrossEntropyLoss(), output_transform=output)
    Accuracy(output_transform=lambda output: (output["y_pred"], output["y"])).attach(engine, "acc")
    Average(output_transform=lambda output: output["loss"].detach()).attach(engine, "loss")
    engine.run(parts.batches, max_epochs=1)


def fabric(parts: Parts) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(parts.net, parts.optimizer)
    loss_fn, metric, total = nn.CrossEntropyLoss(), accuracy(), torch.zeros(())
    for features, target in parts.batches:
        optimizer.zero_grad()
        predictions = model(features)
        loss = loss_fn(predictions, target)
        fabric.backward(loss)
        optimizer.step()
        total += loss.detach()
        metric.update(predictions.detach(), target)


def accelerate(parts: Parts) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(parts.net, parts.optimizer)
    loss_fn, metric, total = nn.CrossEntropyLoss(), accuracy(), torch.zeros(())
    for features, target in parts.batches:
        optimizer.zero_grad()
        predictions = model(features)
        loss = loss_fn(predictions, target)
        accelerator.backward(loss)
        optimizer.step()
        total += loss.detach()
        metric.update(*accelerator.gather_for_metrics((predictions.detach(), target)))


def lightning(parts: Parts) -> None:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss_fn, self.accuracy = parts.net, nn.CrossEntropyLoss(), accuracy()

        def training_step(self, batch: Batch, number: int) -> Tensor:
            features, target = batch
            predictions = self.net(features)
            loss: Tensor = self.loss_fn(predictions, target)
            self.accuracy.update(predictions, target)
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.log("acc", self.accuracy, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return parts.optimizer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    off = dict.fromkeys(("enable_progress_bar", "logger", "enable_checkpointing", "enable_model_summary"), False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that batches need no loading processes
        trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=parts.folder, **off)
        trainer.fit(Module(), Ready(parts.batches))


def torchkeras(parts: Parts) -> None:
    """It has no setting for its progress bar, which goes to a buffer here."""
    with contextlib.redirect_stdout(io.StringIO()):
        from torchkeras import KerasModel

        model = KerasModel(parts.net, nn.CrossEntropyLoss(), {"acc": accuracy()}, parts.optimizer)
        path = str(parts.folder.with_suffix(".pt"))
        batches = Ready(parts.batches)
        batches.size = len(batches)
        model.fit(batches, epochs=1, ckpt_path=path, monitor="train_loss", plot=False, cpu=True)


Loop = Callable[[Parts], None]
OWN: dict[str, Loop] = {
    "bare loop": bare,
    "bare loop, torchmetrics' update": bare_with_metric,
    "bare loop, `.item()` and argmax": bare_with_items,
    "bare loop, `.item()` and torchmetrics' forward": bare_with_forward,
    "dtrain": dtrain,
}
PEERS: dict[str, Loop] = {
    "ignite": ignite,
    "Fabric": fabric,
    "Accelerate": accelerate,
    "Lightning": lightning,
    "torchkeras": torchkeras,
}
