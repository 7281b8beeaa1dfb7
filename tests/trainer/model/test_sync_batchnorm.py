"""Statistics over all ranks where one has no sample. torch's layer is for GPUs: here it does the same on a CPU."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import Samples

from dtrain.trainer.data.indexed import Source
from dtrain.trainer.trainer import Trainer

SIZE, BATCH = 8, 3  # the last batch has two samples, and the last of three ranks none
PRECISIONS: tuple[Any, ...] = ("fp32", "bf16")
SEEN: list[tuple[int, torch.dtype]] = []  # what this rank's layers were given: samples, and of which type


class Summed(torch.autograd.Function):
    """Over all ranks, in both directions."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Summed.forward(ctx, gradient)


def over_all_ranks(layer: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """SyncBatchNorm.forward in training, an empty input included."""
    SEEN.append((len(x), x.dtype))
    x = x.double()
    sums = Summed.apply(torch.cat([x.sum(0), (x * x).sum(0), torch.tensor([float(len(x))])]))
    mean, square = sums[:-1].view(2, -1) / sums[-1].detach()
    return ((x - mean) / (square - mean * mean + layer.eps).sqrt() * layer.weight + layer.bias).float()


def parts() -> tuple[nn.Sequential, Samples]:
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Linear(width, 8), nn.BatchNorm1d(8), nn.Tanh()) for width in (4, 8))
    return nn.Sequential(first, second, nn.Linear(8, 1)), Samples(torch.randn(SIZE, 4), torch.randn(SIZE, 1))


def fit(rank: int, world_size: int, folder: str) -> Any:
    found = []
    for precision in PRECISIONS:
        net, samples = parts()
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        where = f"{folder}/{precision}"
        SEEN.clear()
        with (
            patch.object(nn.SyncBatchNorm, "forward", over_all_ranks),
            patch.object(DistributedDataParallel, "_passing_sync_batchnorm_handle"),  # which wants a GPU
        ):
            trainer = Trainer(net, nn.MSELoss(), optimizer, device="cpu", precision=precision, run_dir=where)
            trainer.fit(Source(samples, BATCH, shuffle=False), epochs=1)
        found.append(([parameter.detach() for parameter in net.parameters()], SEEN[:]))
    return found


def test_a_rank_without_a_sample_counts_for_nothing(tmp_path):
    net, samples = parts()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for first in range(0, SIZE, BATCH):
        batch = slice(first, first + BATCH)
        optimizer.zero_grad()
        nn.functional.mse_loss(net(samples.features[batch]), samples.target[batch]).backward()
        optimizer.step()
    for rank, ((weights, seen), (_, seen_in_16_bits)) in enumerate(run_ranks(3, fit, str(tmp_path))):
        for own, expected in zip(weights, net.parameters(), strict=True):
            torch.testing.assert_close(own, expected.detach(), rtol=1e-4, atol=3e-5)  # of two samples
        has_none = rank == 2
        assert [samples for samples, _ in seen] == [1, 1, 1, 1, 1 - has_none, 1 - has_none]
        # Statistics travel in 32 bits, of none too, where the layer is given 16.
        assert {dtype for samples, dtype in seen_in_16_bits if samples == 0} == ({torch.float32} if has_none else set())
        assert {dtype for samples, dtype in seen_in_16_bits if samples} == {torch.bfloat16}
