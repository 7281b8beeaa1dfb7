"""The order of an epoch: dtrain's keyed permutation beside torch.randperm and indexing.

    python bench/order.py --samples 10000000 --repeats 5

Both give the indices of all positions of an epoch, block by block. They alternate, so that a busy machine slows both;
medians are printed. Then: single calls, and what it takes to continue a set of 10**12 samples at a random step.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from dtrain.trainer.data.permutation import Permutation

BLOCKS = (4096, 65536)
HUGE, BATCH = 10**12, 256


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def with_randperm(num_samples: int, block: int) -> None:
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(0))
    for positions in torch.arange(num_samples).split(block):
        order[positions]


def with_permutation(num_samples: int, block: int) -> None:
    permutation = Permutation(num_samples, 0)
    for start in range(0, num_samples, block):
        permutation(np.arange(start, min(start + block, num_samples)))


def seek() -> None:
    start = random.randrange(HUGE // BATCH) * BATCH
    Permutation(HUGE, 0)(np.arange(start, start + BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10**7)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    default_threads = torch.get_num_threads()
    print(f"{arguments.samples:,} samples, {os.cpu_count()} cores, median of {arguments.repeats}, alternating")
    print("torch's threads   block   torch.randperm   Permutation   ratio    (ns a sample)")
    for threads in sorted({1, default_threads}):
        torch.set_num_threads(threads)
        for block in BLOCKS:
            measured = [partial(function, arguments.samples, block) for function in (with_randperm, with_permutation)]
            rows = [[seconds(function) for function in measured] for _ in range(arguments.repeats)]
            peer, ours = (statistics.median(times) * 1e9 / arguments.samples for times in zip(*rows, strict=True))
            print(f"{threads:15} {block:7} {peer:16.1f} {ours:13.1f} {peer / ours:7.2f}")
    torch.set_num_threads(default_threads)
    for num_samples in (60, 1000, arguments.samples, HUGE):
        permutation = Permutation(num_samples, 0)
        positions = np.arange(min(64, num_samples))
        call = statistics.median(seconds(partial(permutation, positions)) for _ in range(1000))
        print(f"one call, {positions.size} positions of {num_samples:,}: {call * 1e6:.0f} us")
    duration = statistics.median(seconds(seek) for _ in range(1000))
    tracemalloc.start()
    seek()
    _, peak = tracemalloc.get_traced_memory()
    print(f"a batch of {BATCH} at a random step of {HUGE:,}: {duration * 1e6:.0f} us, {peak / 1024:.0f} KiB at most")


if __name__ == "__main__":
    main()
