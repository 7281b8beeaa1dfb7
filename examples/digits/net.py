"""A small convolutional network for 8x8 grey images."""

from __future__ import annotations

from torch import Tensor, nn


class DigitNet(nn.Module):
    """Three convolutions of 3x3, then a linear layer; `width` is the first one's number of channels."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1),  # 8x8 -> 4x4
            nn.GELU(),
            nn.Conv2d(2 * width, 2 * width, kernel_size=3, stride=2, padding=1),  # 4x4 -> 2x2
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * width * 2 * 2, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)
