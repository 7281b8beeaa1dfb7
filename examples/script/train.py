"""An ordinary script: your own loaders, model and optimizer, trained by dtrain.

python train.py                                   # one process
dtrain launch --gpus 4 train.py                   # four, with the same result
dtrain launch --gpus 4 train.py -- --epochs 30    # what follows -- is the script's
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics import Accuracy

from dtrain import Trainer


def digits() -> TensorDataset:
    """scikit-learn's 1,797 handwritten digits, 64 grey values each."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.01)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)  # the same model in every process
    train_data, val_data = random_split(digits(), [0.8, 0.2], generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    trainer = Trainer(
        net,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(net.parameters(), lr=arguments.lr),
        metrics_dict={"acc": Accuracy(task="multiclass", num_classes=10)},
    )
    history = trainer.fit(
        train_data=DataLoader(train_data, batch_size=64, shuffle=True),  # 64 over all processes together
        val_data=DataLoader(val_data, batch_size=64),
        epochs=arguments.epochs,
        monitor="val_acc",
        mode="max",
        patience=3,
    )
    print(history)  # a pandas DataFrame, one row an epoch


if __name__ == "__main__":
    main()
