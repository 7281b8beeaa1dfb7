"""What one batch does, in training and in validation; the loop is dtrain's.

python own_step.py
dtrain launch --gpus 4 own_step.py
dtrain launch --gpus 4 job.yaml          # the same, with step: {_target_: own_step.classify}
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from digits import DigitNet, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy

from dtrain import Trainer


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The batch's mean loss, and what the metrics compare. `model.training` tells training from validation."""
    images, labels = batch
    predictions = model(images)
    return {"loss": F.cross_entropy(predictions, labels), "predictions": predictions, "target": labels}


def main() -> None:
    torch.manual_seed(0)  # the same model in every process
    net = DigitNet()
    accuracy = Accuracy(task="multiclass", num_classes=10)
    trainer = Trainer(net, optimizer=torch.optim.Adam(net.parameters(), lr=0.01), metrics_dict={"acc": accuracy})
    history = trainer.fit(
        DataLoader(digits("train"), batch_size=64, shuffle=True),  # 64 over all processes together
        DataLoader(digits("val"), batch_size=64),
        epochs=5,
        step=classify,
    )
    print(history)


if __name__ == "__main__":
    main()
