"""Two noisy rings in the plane, one inside the other, and a small network that tells them apart."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

POSITIVE, NEGATIVE = 1_000, 6_000  # points on the inner ring and on the outer one


class RingNet(nn.Sequential):
    """Points (N, 2) to logits (N, 1) of lying on the inner ring."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def ring(radius: float, size: int, generator: torch.Generator) -> Tensor:
    """Points at about this distance from the origin, with a standard deviation of 1."""
    distance = radius + torch.randn(size, generator=generator)
    angle = 2 * math.pi * torch.rand(size, generator=generator)
    return torch.stack([distance * angle.cos(), distance * angle.sin()], dim=1)


def rings(split: Literal["train", "val", "all"]) -> TensorDataset:
    """70 % of the points to train on, the rest to validate, or all: (point, 1 on the inner ring and 0 on the outer)."""
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([ring(5.0, POSITIVE, generator), ring(8.0, NEGATIVE, generator)])
    labels = torch.cat([torch.ones(POSITIVE, 1), torch.zeros(NEGATIVE, 1)]).long()
    order = torch.randperm(len(points), generator=generator)
    cut = int(0.7 * len(points))
    chosen = {"train": order[:cut], "val": order[cut:], "all": order}[split]
    return TensorDataset(points[chosen], labels[chosen])
