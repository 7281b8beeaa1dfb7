"""Ranks: a loop of one's own computes on several ranks what a plain one does on one."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import AUROC, Accuracy, MeanMetric, MinMaxMetric
from training import Samples, epoch_order

from dtrain import Ranks
from dtrain.errors import UserError

SIZE, BATCH, EPOCHS = 13, 4, 2  # a last batch of one sample


def samples() -> Samples:
    torch.manual_seed(4)
    return Samples(torch.randn(SIZE, 4), torch.randint(3, (SIZE,)))


def new_net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def own_loop(rank: int, world_size: int, folder: str, by_units: bool) -> Any:
    """What each rank has in the end: values of each epoch, weights, and numbers of batches."""
    ranks = Ranks(device="cpu")
    data = ranks.shard(DataLoader(samples(), batch_size=BATCH, shuffle=True))
    net = ranks.wrap(new_net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    weight = torch.tensor([1.0, 2.0, 0.5]) if by_units else None
    loss_fn = nn.CrossEntropyLoss(weight=weight)
    metrics = ranks.synchronise({"loss": MeanMetric(), "acc": Accuracy("multiclass", num_classes=3), "top": _most})
    rows, batches = [], 0
    for _ in range(EPOCHS):
        for features, target in data:
            predictions = net(features)
            loss = loss_fn(predictions, target)
            units = weight[target].sum() if weight is not None else len(target)
            optimizer.zero_grad()
            ranks.scale_loss(loss, units if by_units else None).backward()
            optimizer.step()
            metrics["loss"].update(loss.detach(), units)
            metrics["acc"].update(predictions, target)
            metrics["top"].update(predictions, target)
            batches += 1
        rows.append({name: metric.compute() for name, metric in metrics.items()})
        assert rows[-1] == {name: metric.compute() for name, metric in metrics.items()}  # nothing is lost by it
        for metric in metrics.values():
            metric.reset()
    ranks.save(net, Path(folder) / "net.pt")
    assert (Path(folder) / "net.pt").exists()
    return rows, batches, len(data)


def _most(predictions: torch.Tensor, target: torch.Tensor) -> float:
    assert len(predictions) == len(target) == SIZE
    return predictions.max().item()


def plain_loop(by_units: bool) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    net, data, rows = new_net(), samples(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    weight = torch.tensor([1.0, 2.0, 0.5]) if by_units else None
    for epoch in range(1, EPOCHS + 1):
        total = units = right = 0.0
        most = -math.inf
        for chosen in epoch_order(SIZE, 0, epoch).split(BATCH):
            features, target = data.features[chosen], data.target[chosen]
            predictions = net(features)
            loss = nn.functional.cross_entropy(predictions, target, weight=weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own = weight[target].sum().item() if weight is not None else len(chosen)
            total, units = total + loss.item() * own, units + own
            right += (predictions.argmax(1) == target).sum().item()
            most = max(most, predictions.max().item())
        rows.append({"loss": total / units, "acc": right / SIZE, "top": most})
    return rows, net.state_dict()


@pytest.mark.parametrize("by_units", [False, True], ids=["samples", "units"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_loop_of_ones_own_is_a_plain_one(world_size, by_units, tmp_path):
    """Weights, and metrics over all ranks; the last batch leaves ranks without a sample."""
    rows, weights = plain_loop(by_units)
    for found, batches, length in run_ranks(world_size, own_loop, str(tmp_path), by_units):
        assert (batches, length) == (EPOCHS * math.ceil(SIZE / BATCH), math.ceil(SIZE / BATCH))
        for row, expected in zip(found, rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(torch.load(tmp_path / "net.pt", weights_only=True), weights, rtol=1e-5, atol=1e-6)


class Tracking(nn.Module):
    """Keeps a sum of what it has seen in training, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.total += x.sum()
        return nn.functional.dropout(x * self.weight, training=self.training)


def with_statistics(rank: int, world_size: int) -> Any:
    """Which batches don't count, and the sum: after each of them, and as it is evaluated."""
    ranks = Ranks(device="cpu")
    net = ranks.wrap(Tracking())
    data = ranks.shard(DataLoader(Samples(torch.arange(20.0).view(5, 4), torch.zeros(5)), batch_size=4))
    counts, totals = [], [0.0]
    state = torch.get_rng_state()
    for features, _ in data:
        counts.append(ranks.has_samples)
        ranks.scale_loss(net(features).sum()).backward()
        totals.append(net.total.item())
        if ranks.has_samples:
            state = torch.get_rng_state()
    kept = torch.get_rng_state().equal(state), net.total.item()
    net.eval()
    for _ in data:
        break
    return counts, totals, kept, net.total.item()


def test_a_rank_without_samples_leaves_no_trace_and_rank_0s_buffers_are_evaluated():
    (counts, totals, kept, shared), (its_counts, its_totals, its_kept, its_shared) = run_ranks(2, with_statistics)
    first, second, last = (float(sum(range(begin, end))) for begin, end in ((0, 8), (8, 16), (16, 20)))
    assert (counts, totals, kept) == ([True, True], [0.0, first, first + last], (True, first + last))
    assert (its_counts, its_totals[1], its_kept) == ([True, False], second, (True, second))
    assert its_totals[2] > second  # in that batch, until it was over
    assert shared == its_shared == first + last


class Attributes(nn.Module):
    """With names that DDP has for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.device, self.calls = 3, "any", 0
        self.parts = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
        self.register_forward_hook(_count)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts(x) * self.scale


def _count(net: Any, *_: Any) -> None:
    net.calls += 1


def looked_at(rank: int, world_size: int) -> Any:
    ranks, net = Ranks(device="cpu"), Attributes()
    wrapped = ranks.wrap(net)
    wrapped.scale = 2.0
    for features, _ in ranks.shard(DataLoader(Samples(torch.arange(16.0).view(4, 4), torch.zeros(4)), batch_size=4)):
        ranks.scale_loss(wrapped(features).sum()).backward()
    twin = copy.deepcopy(wrapped)
    nn.init.zeros_(twin.parts[0].weight)
    nn.init.zeros_(twin.parts[0].bias)
    assert not twin(torch.ones(1, 4)).any()
    assert type(twin) is Attributes
    other = ranks.wrap(nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    assert other[:1](torch.ones(1, 4)).equal(other[0](torch.ones(1, 4)))
    with pytest.raises(UserError, match="already wrapped"):
        ranks.wrap(wrapped)
    seen = [type(wrapped).__name__, isinstance(wrapped, Attributes), wrapped.dim, wrapped.device, net.scale]
    return [*seen, list(wrapped.state_dict()), net.calls, net.parts[0].bias.grad.tolist()]


def test_what_is_wrapped_is_the_model_on_any_number_of_ranks():
    torch.manual_seed(0)
    [alone], [first, second] = run_ranks(1, looked_at), run_ranks(2, looked_at)
    assert alone[:-1] == first[:-1] == second[:-1]
    assert first[-1] == second[-1]


def test_a_loop_that_continues_has_the_order_of_its_epoch():
    data = Ranks(device="cpu", seed=7).shard(DataLoader(Samples(np.arange(SIZE), torch.arange(SIZE)), BATCH, True))
    data.set_epoch(3)
    assert torch.cat([target for _, target in data]).equal(epoch_order(SIZE, 7, 3))
    assert torch.cat([target for _, target in data]).equal(epoch_order(SIZE, 7, 4))


def test_what_is_refused(tmp_path):
    ranks, net = Ranks(device="cpu"), new_net()
    with pytest.raises(UserError, match=r"iterate over the batches of ranks\.shard"):
        ranks.scale_loss(torch.tensor(1.0))
    with pytest.warns(DeprecationWarning, match="called scale_loss now"):
        assert ranks.weigh(torch.tensor(1.0), units=2) == 1.0
    with pytest.raises(UserError, match=r"was not returned by Ranks\.wrap"):
        ranks.save(net, tmp_path / "net.pt")
    wrapped = ranks.wrap(net)
    with pytest.raises(UserError, match="can't be written: No such file"):
        ranks.save(wrapped, tmp_path / "nowhere" / "net.pt")
    metric = ranks.synchronise({"auc": AUROC(task="binary")})["auc"]
    metric.update(torch.tensor([-3.0, 3.0]), torch.tensor([0, 1]))
    with pytest.raises(UserError, match="metrics auc: some predictions are outside"):
        metric.compute()


def unwrapped(rank: int, world_size: int) -> str:
    ranks = Ranks(device="cpu")
    for features, _ in ranks.shard(DataLoader(samples(), batch_size=BATCH)):
        with pytest.raises(UserError) as refused:
            ranks.scale_loss(features.sum())
        return str(refused.value)
    return ""


def test_gradients_that_nobody_averages():
    assert all("net = ranks.wrap(net)" in said for said in run_ranks(2, unwrapped))


def leaving_out(rank: int, world_size: int) -> str:
    """In the last batch, after which DDP would look no more."""
    ranks = Ranks(device="cpu")
    net = ranks.wrap(nn.ModuleDict({"head": nn.Linear(4, 3), "other": nn.Linear(4, 3)}))
    batches = iter(data := ranks.shard(DataLoader(samples(), batch_size=BATCH)))
    for batch in range(1, len(data) + 1):
        features, _ = next(batches)
        heads = ["head"] if batch == len(data) else ["head", "other"]
        sum(ranks.scale_loss(net[name](features).mean()) for name in heads).backward()
    with pytest.raises(UserError) as refused:
        next(batches)
    return str(refused.value)


def test_a_batch_that_leaves_out_parameters_is_refused():
    expected = "the loss of the batch does not depend on the parameters other.weight, other.bias"
    assert all(said.startswith(expected) for said in run_ranks(2, leaving_out))


def added_to(rank: int, world_size: int) -> Any:
    """A value, and the one after more samples on one of the ranks."""
    metric = Ranks(device="cpu").synchronise({"loss": MeanMetric()})["loss"]
    metric.update(torch.tensor(float(rank)), 1)
    first = metric.compute()
    if rank == 1:
        metric.update(torch.tensor(4.0), 2)
    return first, metric.compute()


def test_a_value_is_of_all_that_has_been_added():
    assert run_ranks(2, added_to) == [(0.5, (0 + 1 + 2 * 4) / 4)] * 2


def remembering(rank: int, world_size: int) -> Any:
    """A wrapper of a metric, which remembers its best, on ranks of which one sees nothing at first."""
    ranks = Ranks(device="cpu")
    metric = ranks.synchronise({"acc": MinMaxMetric(Accuracy(task="binary"))})["acc"]
    if rank == 0:
        metric.update(torch.tensor([0.9, 0.1]), torch.tensor([1, 1]))
    return metric.compute()


def test_metrics_that_give_several_values():
    expected = {"acc_raw": 0.5, "acc_max": 0.5, "acc_min": 0.5}
    assert run_ranks(2, remembering) == [expected, expected]


def make_rivals() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(6)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 1)


def contend(generator: nn.Module, discriminator: nn.Module, batches: Any, scale: Any) -> None:
    """Three losses with backward passes of their own, the last one through both models."""
    for_generator, for_discriminator = (torch.optim.Adam(net.parameters()) for net in (generator, discriminator))
    loss_fn = nn.BCEWithLogitsLoss()
    for features, _ in batches:
        true, false, made = torch.ones(len(features), 1), torch.zeros(len(features), 1), generator(features.flip(1))
        for_discriminator.zero_grad()
        scale(loss_fn(discriminator(features), true)).backward()
        scale(loss_fn(discriminator(made.detach()), false)).backward()
        for_discriminator.step()
        for_generator.zero_grad()
        scale(loss_fn(discriminator(made), true)).backward()
        for_generator.step()


def contending(rank: int, world_size: int, folder: str, strategy: Literal["ddp", "fsdp"]) -> None:
    ranks = Ranks(device="cpu")
    data = ranks.shard(DataLoader(samples(), batch_size=BATCH))
    rivals = [ranks.wrap(net, strategy=strategy) for net in make_rivals()]
    contend(*rivals, data, ranks.scale_loss)
    for number, net in enumerate(rivals):
        ranks.save(net, Path(folder) / f"{number}.pt")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_models_against_each_other(strategy, tmp_path):
    run_ranks(2, contending, str(tmp_path), strategy)
    contend(*(rivals := make_rivals()), DataLoader(samples(), batch_size=BATCH), lambda loss: loss)
    for number, net in enumerate(rivals):
        found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        torch.testing.assert_close(found, net.state_dict(), rtol=1e-5, atol=1e-6)
