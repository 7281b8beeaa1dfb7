"""A GAN of points: eight heaps on a circle, and a generator that learns to draw from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

HEAPS, DEVIATION, NOISE = 8, 0.1, 8
ANGLES = 2 * math.pi * torch.arange(HEAPS) / HEAPS
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


class Heaps(Dataset[tuple[Tensor, Tensor]]):
    """(a point of a heap, noise to generate one from); each sample's random numbers are its own on any rank."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return CENTRES[index % HEAPS] + DEVIATION * torch.randn(2), torch.randn(NOISE)


def layers(inputs: int, outputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2)),
        nn.Linear(width, outputs),
    )


class Gan(nn.Module):
    """Noise (N, 8) to points (N, 2), and points to logits (N, 1) of being real."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.generator = layers(NOISE, 2, width)
        self.discriminator = layers(2, 1, width)


def step(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    points, noise = batch
    made = model.generator(noise)
    real, fake = model.discriminator(points), model.discriminator(made.detach())
    yield {"optimizer": "discriminator", "loss": F.softplus(-real).mean() + F.softplus(fake).mean()}
    near = (torch.cdist(made, CENTRES.to(made.device)).amin(dim=1) < 3 * DEVIATION).float().mean()
    yield {"optimizer": "generator", "loss": F.softplus(-model.discriminator(made)).mean(), "log": {"near": near}}
