"""Linear regression on a million points, timed: how much faster it gets with more processes.

python train.py
dtrain launch --gpus 2 train.py
dtrain launch --gpus 2 job.yaml

All points are one batch, as in textbooks: each process computes with its share of them, and the gradients' mean is
that of all. The loop is the script's own, since a million points that are a tensor need no loader.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn

from dtrain import Ranks

WEIGHTS, BIAS, NOISE = (2.0, -3.0), 10.0, 2.0


def points(size: int) -> tuple[Tensor, Tensor]:
    """x in [-5, 5)^2, and y = w x + b with normal noise: (N, 2) and (N, 1)."""
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.rand(size, 2, generator=generator) - 5
    noise = NOISE * torch.randn(size, 1, generator=generator)
    return x, x @ torch.tensor(WEIGHTS)[:, None] + BIAS + noise


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a line to many points.")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()

    ranks = Ranks()
    x, y = (part[ranks.rank :: ranks.world_size].to(ranks.device) for part in points(arguments.points))
    torch.manual_seed(0)
    net = ranks.wrap(nn.Linear(2, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    began = time.perf_counter()
    for step in range(1, arguments.steps + 1):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        ranks.scale_loss(loss, units=len(x)).backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.4f}")  # of this process's points
    seconds = time.perf_counter() - began
    weights, bias = (parameter.detach().cpu().flatten().tolist() for parameter in net.parameters())
    print(f"w = ({weights[0]:.3f}, {weights[1]:.3f}), b = {bias[0]:.3f}")
    print(f"{arguments.steps} steps on {ranks.world_size} x {ranks.device.type}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
