"""Steps in which the CPU must not wait for the GPU."""

from __future__ import annotations

import traceback
from typing import Any

import torch
import torchmetrics
from accuracy import data
from checks import LeftOut, Place, check
from torch import Tensor, nn

from dtrain import Trainer

FIRST, LAST = 4, 24  # of the steps that are watched
COUNTING = {"confusion", "f1"}  # torchmetrics' bincount waits; they are named, and no failure


def metrics() -> dict[str, torchmetrics.Metric]:
    """By name, of 8 classes."""
    return {
        "accuracy": torchmetrics.Accuracy(task="multiclass", num_classes=8, average="micro"),
        "top-3": torchmetrics.Accuracy(task="multiclass", num_classes=8, top_k=3),
        "auroc": torchmetrics.AUROC(task="multiclass", num_classes=8, thresholds=20),
        "f1": torchmetrics.F1Score(task="multiclass", num_classes=8, average="macro"),
        "confusion": torchmetrics.ConfusionMatrix(task="multiclass", num_classes=8),
    }


def binary_metrics() -> dict[str, torchmetrics.Metric]:
    """By name, of 8 labels."""
    return {
        "multilabel": torchmetrics.Accuracy(task="multilabel", num_labels=8),
        "mse": torchmetrics.MeanSquaredError(num_outputs=8),
        "binary": torchmetrics.Accuracy(task="binary"),
    }


def weighted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A user's step, whose loss is a mean over what is not class 0."""
    features, target = batch
    each = nn.functional.cross_entropy(model(features), target, reduction="none")
    counts = (target != 0).float()
    return {"loss": (each * counts).sum() / counts.sum().clamp(min=1), "weight": counts.sum()}


def mse(predictions: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(predictions, nn.functional.one_hot(target, 8).float())


def labels(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """A step with 8 labels a sample."""
    features, target = batch
    found, wanted = model(features).sigmoid(), nn.functional.one_hot(target, 8)
    return {"loss": nn.functional.mse_loss(found, wanted.float()), "predictions": found, "target": wanted}


def cases() -> dict[str, dict[str, Any]]:
    """Arguments of Trainer by name."""
    loss = {"loss_fn": nn.CrossEntropyLoss()}
    found: dict[str, dict[str, Any]] = {
        "CE": loss,
        "MSE": {"loss_fn": mse},
        "class weights": {"loss_fn": nn.CrossEntropyLoss(weight=torch.arange(1.0, 9.0))},
        "clip_norm": {**loss, "clip_norm": 0.1},
        "clip_value": {**loss, "clip_value": 0.01},
        "ema": {**loss, "ema": 0.9},
        "micro-batches": {**loss, "micro_batch_size": 6},
        "bf16": {**loss, "precision": "bf16"},
        "a weighted step": {"step": weighted},
    }
    kinds = {"softmax": (loss, metrics()), "none": ({"step": labels}, binary_metrics())}
    for activation, (how, made) in kinds.items():
        for name, metric in made.items():
            known = {"activations": {name: activation}} if name != "mse" else {}
            found[name] = {**how, "metrics_dict": {name: metric}, **known}
    return found


@check(4, "no wait for the device in 20 steps: losses, limits, ema, weights, metrics", limit_s=150)
def syncs(place: Place) -> str:
    waits = {}
    for name, options in cases().items():
        try:
            steps = watched(place, name, options)
        except Exception as error:
            if "synchroniz" not in str(error):
                raise
            waits[name] = str(error)
            print(f"---- {name}", flush=True)
            traceback.print_exc()
        else:
            assert steps >= LAST, f"{name}: {steps} steps"
    bad = sorted(waits.keys() - COUNTING)
    assert not bad, f"the step waits with {', '.join(bad)}"
    if not place.has_gpu:
        raise LeftOut(f"{len(cases())} trainings run; only a GPU shows what waits for it")
    known = f", but for {', '.join(sorted(waits))}" if waits else ""
    return f"none of {len(cases())} waits{known}"


def watched(place: Place, name: str, options: dict[str, Any]) -> int:
    """Train an epoch, in which torch raises where the CPU waits for the GPU; how many steps it had."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 64), nn.ReLU(), nn.Linear(64, 8))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    steps = 0

    def look(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if place.has_gpu and steps in (FIRST, LAST):
            torch.cuda.set_sync_debug_mode("error" if steps == FIRST else "default")

    optimizer.register_step_post_hook(look)
    loader = data(3, 8, 8, samples=30 * 16)
    try:
        Trainer(net, optimizer=optimizer, device=place.device, run_dir=place.folder / name, **options).fit(
            loader, epochs=1
        )
    finally:
        if place.has_gpu:
            torch.cuda.set_sync_debug_mode("default")
    return steps
