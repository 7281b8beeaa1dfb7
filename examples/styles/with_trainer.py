"""Your own loaders, model and optimizer, in a class that trains, evaluates and predicts.

python with_trainer.py                                   # one process; in a notebook as well
dtrain launch --gpus 4 with_trainer.py                   # four, with the same result
dtrain launch --gpus 4 with_trainer.py -- --epochs 30    # what follows -- is the script's
"""

from __future__ import annotations

import argparse

import torch
from digits import DigitNet, digits
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy

from dtrain import Trainer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small network on handwritten digits.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.01)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)  # the same model in every process
    net = DigitNet()
    trainer = Trainer(
        net,
        loss_fn=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(net.parameters(), lr=arguments.lr),
        metrics_dict={"acc": Accuracy(task="multiclass", num_classes=10)},
    )
    val_data = DataLoader(digits("val"), batch_size=64)
    history = trainer.fit(
        train_data=DataLoader(digits("train"), batch_size=64, shuffle=True),  # 64 over all processes together
        val_data=val_data,
        epochs=arguments.epochs,
        monitor="val_acc",
        mode="max",
        patience=3,
    )
    print(history)  # a pandas DataFrame, one row an epoch
    print(trainer.evaluate(val_data))  # of the model as it is, after the last step
    print(trainer.predict(val_data).argmax(dim=1)[:10])


if __name__ == "__main__":
    main()
