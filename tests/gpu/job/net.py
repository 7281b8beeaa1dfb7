"""A small network that does something of its own at one step."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Convolution, batch norm and dropout.

    Args:
        acts: what it does in its training's forward pass number `at`, until a file called `go` is there: "raises",
            "waits" (its pid is in a file called `waiting`), "allocates" more than there is, "reaches" beyond a tensor,
            or "hangs" in a kernel.
    """

    def __init__(self, acts: str, at: int, dropout: float, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(16 * 4 * 4, 64),
            nn.ReLU(),
            nn.Linear(64, outputs),
        )
        self.acts, self.at = acts, at
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        if self.training and self.calls == self.at and not os.path.exists("go"):
            getattr(self, f"_{self.acts}")(images)
        return self.layers(images)

    def _raises(self, images: Tensor) -> None:
        raise RuntimeError("on purpose")

    def _waits(self, images: Tensor) -> None:
        Path("waiting.new").write_text(str(os.getpid()))
        os.rename("waiting.new", "waiting")
        while not os.path.exists("go"):
            time.sleep(0.02)

    def _allocates(self, images: Tensor) -> None:
        torch.ones(1 << 44, device=images.device)

    def _reaches(self, images: Tensor) -> None:
        far = torch.full((4,), 1 << 30, device=images.device)
        images.flatten().index_select(0, far).sum().item()

    def _hangs(self, images: Tensor) -> None:
        if images.is_cuda:
            for _ in range(1000):
                torch.cuda._sleep(1 << 40)  # ten minutes each
            torch.cuda.synchronize()
        time.sleep(1e6)
