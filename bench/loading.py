"""What it costs to seed each sample: loading through torchvision's transforms, with and without.

    python bench/loading.py [--repeats 7] [--images 256]

Both sides read the same images through the same DataLoader, alternating; medians of the CPU time a sample, to which
what else the machine does adds little.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from dtrain.trainer.data.indexed import IndexedBatches, Source
from dtrain.trainer.distributed.seeds import seed_loading
from dtrain.trainer.distributed.world import World

BATCH = 64


class Images(Dataset[Any]):
    """JPEG files in memory, decoded and transformed one by one."""

    def __init__(self, number: int, size: tuple[int, int], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.transform = transform
        self.files = []
        for i in range(8):
            smooth = Image.fromarray(np.random.default_rng(i).integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(
                size
            )
            file = io.BytesIO()
            smooth.save(file, "JPEG")
            self.files.append(file.getvalue())
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(io.BytesIO(self.files[index % len(self.files)])).convert("RGB"))


def normalised(*steps: Any) -> T.Compose:
    return T.Compose([*steps, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize([0.5] * 3, [0.25] * 3)])


# Small images in larger number, which is a multiple here.
PIPELINES = {
    "500x375, RandomResizedCrop(224)": (1, (500, 375), normalised(T.RandomResizedCrop(224))),
    "32x32, RandomCrop(32, padding=4)": (16, (32, 32), normalised(T.RandomCrop(32, padding=4))),
}


def plain(dataset: Dataset[Any]) -> None:
    for _ in DataLoader(dataset, BATCH, shuffle=True):
        pass


def seeded(dataset: Dataset[Any]) -> None:
    alone = World(0, 1, torch.device("cpu"))
    for batch in IndexedBatches(Source(dataset, BATCH, shuffle=True), alone, 0, None, fill_empty=True).epoch(1):
        for _ in batch.micro_batches:
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--images", type=int, default=256)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    seeding = statistics.median(timeit.repeat(lambda: seed_loading(12345), number=1000)) / 1000
    print(f"seeding: {seeding * 1e6:.1f} us a sample")
    for name, (times, size, transform) in PIPELINES.items():
        number = asked.images * times
        dataset = Images(number, size, transform)
        seconds: dict[Any, list[float]] = {plain: [], seeded: []}
        for _ in range(asked.repeats):
            for way, taken in seconds.items():
                began = time.process_time()
                way(dataset)
                taken.append((time.process_time() - began) / number)
        bare, ours = (statistics.median(taken) for taken in seconds.values())
        change = f"{ours / bare - 1:+.1%}; seeding alone is {seeding / bare:.2%}"
        print(f"{name}: plain {bare * 1e6:.1f} us a sample, seeded {ours * 1e6:.1f} us of CPU time ({change})")


if __name__ == "__main__":
    main()
