"""MNIST: 60,000 images to train on and 10,000 to validate."""

from __future__ import annotations

import fcntl
from pathlib import Path

from torchvision.datasets import MNIST
from torchvision.transforms import ToTensor


def mnist(root: str, train: bool, download: bool = True) -> MNIST:
    """The images in `root`, as tensors of values from 0 to 1; downloaded once if missing."""
    if download:
        _fetch(Path(root))
    return MNIST(root, train=train, transform=ToTensor())


def _fetch(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    # Every rank calls this: one fetches, the others wait, and find the files there.
    with (root / "mnist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        MNIST(str(root), download=True)
