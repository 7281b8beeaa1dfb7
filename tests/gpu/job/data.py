"""Images of noise, to be told apart by their brightness."""

from __future__ import annotations

import torch
from torch.utils.data import TensorDataset


def images(size: int, seed: int, classes: int) -> TensorDataset:
    """(3, 8, 8) images with one of so many classes; with none, with their brightness, a number."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(size, generator=generator)
    noise = torch.randn(size, 3, 8, 8, generator=generator)
    target = (level * classes).long() if classes else level[:, None]
    return TensorDataset(level[:, None, None, None] * 2 + 0.5 * noise, target)
