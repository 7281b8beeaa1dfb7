"""What the campaign trains by a loop of its own: the job's model and data, and all that such a loop has to remember."""

import argparse

import data
import net
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import AUROC, Accuracy

from dtrain import Fsdp, Ranks

parser = argparse.ArgumentParser()
parser.add_argument("--workers", type=int)
parser.add_argument("--micro-batch-size", type=int)
parser.add_argument("--every", type=lambda text: int(text) if text.isdecimal() else text)
parser.add_argument("--strategy", default="ddp")
given = parser.parse_args()

torch.manual_seed(6)
ranks = Ranks(seed=6)
points = data.Points(100, training=True)
train_data = ranks.shard(
    DataLoader(points, batch_size=13, shuffle=True, num_workers=given.workers), micro_batch_size=given.micro_batch_size
)
val_data = [
    ranks.shard(DataLoader(data.Points(size, first=first), batch_size=13)) for size, first in ((24, 0), (11, 24))
]
model = ranks.wrap(net.Net(), strategy=Fsdp(wrap=["Linear"]) if given.strategy == "fsdp" else "ddp")
loss_fn = nn.CrossEntropyLoss()
optimizer = net.Adam(model.parameters(), lr=0.02)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)
metrics = ranks.synchronise(
    {name: Accuracy(task="multiclass", num_classes=3) for name in ("train_acc", "val_acc")}
    | {"val_auroc": AUROC(task="multiclass", num_classes=3)}
)

parts = {"optimizer": optimizer, "scheduler": scheduler}
for _ in ranks.epochs(3, net=model, monitor="val_acc", mode="max", patience=3, checkpoint_every=given.every, **parts):
    model.train()
    for features, target in train_data:
        predictions = model(features)
        loss = loss_fn(predictions, target)
        ranks.scale_loss(loss).backward()
        if ranks.ends_batch:
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        ranks.log(train_loss=loss)
        metrics["train_acc"].update(predictions, target)
    model.eval()
    with torch.no_grad():
        for loader in val_data:
            for features, target in loader:
                predictions = model(features)
                ranks.log(val_loss=loss_fn(predictions, target))
                for name in ("val_acc", "val_auroc"):
                    metrics[name].update(predictions.softmax(1), target)
    ranks.report(**{name: metric.compute() for name, metric in metrics.items()})
    for metric in metrics.values():
        metric.reset()
