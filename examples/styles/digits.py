"""What all four scripts here train: a network on scikit-learn's 1,797 handwritten digits of 8x8."""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class DigitNet(nn.Sequential):
    """Grey values of 64 pixels to the logits of 10 digits."""

    def __init__(self, width: int = 128) -> None:
        super().__init__(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def digits(split: Literal["train", "val"]) -> TensorDataset:
    """One of two parts, which share no image and are the same in every process."""
    images, labels = load_digits(return_X_y=True)
    features: Tensor = torch.tensor(images, dtype=torch.float32) / 16  # grey values are 0 to 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    chosen = order[:360] if split == "val" else order[360:]
    return TensorDataset(features[chosen], torch.tensor(labels)[chosen])
