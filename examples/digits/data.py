"""scikit-learn's handwritten digits: 1,797 grey images of 8x8."""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset


def digits(split: Literal["train", "val"], val_share: float = 0.2) -> TensorDataset:
    """One of two parts, which share no image and are the same in every run."""
    images, labels = load_digits(return_X_y=True)
    features = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # grey values are 0 to 16
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    num_val = int(val_share * len(labels))
    chosen = order[:num_val] if split == "val" else order[num_val:]
    return TensorDataset(features[chosen], torch.tensor(labels)[chosen])
