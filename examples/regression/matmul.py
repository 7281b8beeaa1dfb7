"""A 10,000 x 200 by 200 x 10,000 product on each device of this machine, timed: python matmul.py."""

from __future__ import annotations

import statistics
import time

import torch

ROWS, INNER, REPEATS = 10_000, 200, 7


def product_seconds(device: torch.device) -> float:
    """The median time of a few products; the first, which also sets up the device, does not count."""
    a, b = torch.rand(ROWS, INNER, device=device), torch.rand(INNER, ROWS, device=device)
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        torch.matmul(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the call returns before the product is made
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def main() -> None:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for name in devices:
        seconds = product_seconds(torch.device(name))
        operations = 2 * ROWS * ROWS * INNER
        print(f"{name}: {1000 * seconds:.1f} ms, {operations / seconds / 1e9:,.0f} GFLOPS")


if __name__ == "__main__":
    main()
