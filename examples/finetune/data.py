"""Images of stripes, whose direction is the class: small, and learned in seconds."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

DIRECTIONS = 4


class Stripes(Dataset[tuple[Tensor, int]]):
    """(3, 32, 32) images. Each follows from its index; the offset keeps the two parts apart."""

    def __init__(self, split: Literal["train", "val"], samples: int) -> None:
        self.samples, self.offset = samples, 0 if split == "train" else 10**6

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index + self.offset)
        direction, (phase, *tint) = index % DIRECTIONS, torch.rand(4, generator=generator).tolist()
        y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
        angle = math.pi * direction / DIRECTIONS
        waves = torch.sin(x * math.cos(angle) + y * math.sin(angle) + 2 * math.pi * phase)
        noise = 0.3 * torch.randn(3, 32, 32, generator=generator)
        return waves * (0.5 + torch.tensor(tint)).view(3, 1, 1) + noise, direction
