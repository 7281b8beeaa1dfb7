"""own_loop.py, but it continues where it was stopped: dtrain launch --gpus 4 own_loop_resumed.py."""

import torch
from digits import DigitNet, digits
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MeanMetric

from dtrain import Ranks

torch.manual_seed(0)
ranks = Ranks()
train_data = ranks.shard(DataLoader(digits("train"), batch_size=64, shuffle=True))
val_data = ranks.shard(DataLoader(digits("val"), batch_size=64))
net = ranks.wrap(DigitNet())
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
accuracy = Accuracy(task="multiclass", num_classes=10)
metrics = ranks.synchronise({"train_loss": MeanMetric(), "val_loss": MeanMetric(), "val_acc": accuracy})

for _ in ranks.epochs(5, net=net, optimizer=optimizer):
    net.train()
    for images, labels in train_data:
        loss = loss_fn(net(images), labels)
        optimizer.zero_grad()
        ranks.scale_loss(loss).backward()
        optimizer.step()
        metrics["train_loss"].update(loss.detach(), len(labels))
    net.eval()
    with torch.no_grad():
        for images, labels in val_data:
            predictions = net(images)
            metrics["val_loss"].update(loss_fn(predictions, labels), len(labels))
            metrics["val_acc"].update(predictions, labels)
    ranks.report(**{name: metric.compute() for name, metric in metrics.items()})
    for metric in metrics.values():
        metric.reset()
ranks.save(net, "net.pt")
