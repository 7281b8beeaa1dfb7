"""The plain loop with nn.DataParallel, as tutorials have it; docs/dataparallel.md says what is wrong with it."""

import torch
from digits import DigitNet, digits
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MeanMetric

torch.manual_seed(0)
device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
train_data = DataLoader(digits("train"), batch_size=64, shuffle=True)
val_data = DataLoader(digits("val"), batch_size=64)
net = nn.DataParallel(DigitNet()).to(device)
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
accuracy = Accuracy(task="multiclass", num_classes=10).to(device)
metrics = {"train_loss": MeanMetric().to(device), "val_loss": MeanMetric().to(device), "val_acc": accuracy}

for epoch in range(1, 6):
    net.train()
    for step, (images, labels) in enumerate(train_data, start=1):
        images, labels = images.to(device), labels.to(device)
        loss = loss_fn(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics["train_loss"].update(loss.detach(), len(labels))
        if step % 10 == 0:
            print(f"step {step}  loss {loss.item():.4f}")
    net.eval()
    with torch.no_grad():
        for images, labels in val_data:
            images, labels = images.to(device), labels.to(device)
            predictions = net(images)
            metrics["val_loss"].update(loss_fn(predictions, labels), len(labels))
            metrics["val_acc"].update(predictions, labels)
    print(epoch, {name: float(metric.compute()) for name, metric in metrics.items()})
    for metric in metrics.values():
        metric.reset()
torch.save(net.state_dict(), "net.pt")
