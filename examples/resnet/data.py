"""Images from a folder of classes, or random ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images


def images(
    split: Literal["train", "val"], size: int, classes: int, samples: int, root: str | None = None
) -> Dataset[Any]:
    """(3, size, size) images with their class: from root/train or root/val, one folder per class, or random ones."""
    shape = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if split == "train" else [v2.Resize((size, size))]
    transform = v2.Compose([v2.ToImage(), *shape, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    if root is not None:
        return ImageFolder(str(Path(root) / split), transform)
    # An image follows from its index; the offset keeps the two parts apart.
    return FakeData(samples, (3, size, size), classes, transform, random_offset=0 if split == "train" else 10**6)
