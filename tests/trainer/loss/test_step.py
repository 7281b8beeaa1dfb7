"""One optimizer step: what it waits for, what it sends, and that an empty share leaves no trace."""

from __future__ import annotations

import io
import random
from collections import Counter
from contextlib import ExitStack, redirect_stderr
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import count_collectives, run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torchmetrics import Accuracy
from training import Job, Samples, make_loop

from dtrain.errors import UserError
from dtrain.schema.sections import Fsdp
from dtrain.trainer.data.indexed import MicroBatch
from dtrain.trainer.data.samples import read_samples
from dtrain.trainer.data.sharding import Indices
from dtrain.trainer.distributed.seeds import derive_seed, sample_seeds
from dtrain.trainer.loss.user_step import user_step

CLASSES, LENGTH = 3, 4


class Net(nn.Module):
    """Batch norm and dropout, and a buffer that the backward pass reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv1d(2, 5, 1)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(5 * LENGTH, CLASSES)
        self.register_buffer("scale", torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x) * self.scale)).flatten(1))


def samples(number: int, noise: float) -> Samples:
    torch.manual_seed(2)
    return Samples(torch.randn(number, 2, LENGTH), torch.randint(CLASSES, (number,)), noise)


def job(number: int, batch_size: int, micro_batch_size: int | None, loss_fn: Any, noise: float = 0.0) -> Job:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    trainer = {"net": net, "loss_fn": loss_fn, "optimizer": optimizer, "micro_batch_size": micro_batch_size}
    trainer["metrics_dict"] = {"acc": Accuracy(task="multiclass", num_classes=CLASSES, validate_args=False)}
    trainer["scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "trainer": trainer | {"scheduler_interval": "step"},
        "train": samples(number, noise),
        "batch_size": batch_size,
    }


def seed(rank: int) -> None:
    torch.manual_seed(rank)
    np.random.seed(rank)
    random.seed(rank)


def draws() -> list[float]:
    """What all three generators would give next."""
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def seeded(positions: range) -> Indices:
    """The samples at these positions of the first epoch, in the dataset's order."""
    indices = Indices(positions)
    indices.seeds = sample_seeds(np.array(positions), derive_seed("loading", 0, 1)).tolist()
    return indices


# -- empty shares --------------------------------------------------------------------------------

# For each rank the micro-batches with samples, as the rule for shares has them; all other parts are empty.
SHARES = {
    (1, None): [[[0]], [], []],
    (2, None): [[[0]], [[1]], []],
    (4, 1): [[[0], [1]], [[2]], [[3]]],
}


def take_a_step(rank: int, world_size: int, folder: str, number: int, micro_batch_size: int | None) -> Any:
    weighted = nn.CrossEntropyLoss(weight=torch.ones(CLASSES)) if number == 2 else nn.CrossEntropyLoss()
    loop = make_loop(folder, job(number, 4, micro_batch_size, weighted, noise=0.1))
    seed(rank)
    loop.train_epoch()
    sums = [state.value for state in loop.data.train_tally.states()]
    reported = loop.data.train_tally.finish(sums) if any(sums) else {}
    return {name: value.clone() for name, value in loop.trained.model.bare.state_dict().items()}, draws(), reported


@pytest.mark.parametrize(("number", "micro_batch_size"), SHARES)
def test_an_empty_share_leaves_no_trace(number, micro_batch_size, tmp_path):
    results = run_ranks(3, take_a_step, str(tmp_path), number, micro_batch_size)

    whole, gradients, buffers = samples(number, noise=0.1), [], []
    data = read_samples(whole, seeded(range(number)))
    for rank, micro_batches in enumerate(SHARES[number, micro_batch_size]):
        net = Net()
        seed(rank)
        loss_sum = correct = 0.0
        for chosen in micro_batches:
            features, target = (torch.stack(each) for each in zip(*(data[i] for i in chosen), strict=True))
            predictions = net(features)
            loss = F.cross_entropy(predictions, target, reduction="sum")
            (loss / number).backward()
            loss_sum += loss.item()
            correct += int((predictions.argmax(1) == target).sum())
        assert results[rank][1] == draws()  # the random numbers that dropout took for its own samples, and no more
        taken = sum(map(len, micro_batches))
        expected = {"train_loss": loss_sum / taken, "train_acc": correct / taken} if taken else {}
        assert results[rank][2] == pytest.approx(expected, rel=1e-6)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
        buffers.append(dict(net.named_buffers()))

    net = Net()
    for parameter, *parts in zip(net.parameters(), *gradients, strict=True):
        parameter.data -= 0.1 * torch.stack(parts).sum(0)
    for rank, (state, _, _) in enumerate(results):
        for name, value in net.named_parameters():
            torch.testing.assert_close(state[name], value.data, rtol=1e-5, atol=1e-7)
        for name, value in buffers[rank].items():
            assert torch.equal(state[name], value), name


# -- waiting and sending -------------------------------------------------------------------------

WAITS = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__")
LOSSES = {
    "by samples": (nn.MultiMarginLoss(), 0),
    "by weights": (nn.CrossEntropyLoss(label_smoothing=0.1), 1),  # all-reduces of the weight in each step
}


def count(rank: int, world_size: int, folder: str, loss: str, micro_batches: int) -> tuple[Counter, Counter, int]:
    """The waits inside of steps, the collectives of an epoch, and the buckets that DDP all-reduced."""
    number, batch_size = 26, 8  # the last batch has 1 sample a rank
    loop = make_loop(folder, job(number, batch_size, -(-batch_size // world_size // micro_batches), LOSSES[loss][0]))
    waits: Counter[str] = Counter()
    buckets = 0

    def counted(name: str) -> Any:
        original = getattr(Tensor, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            waits[name] += 1
            return original(*args, **kwargs)

        return method

    def hook(group, bucket):
        nonlocal buckets
        buckets += 1
        return allreduce_hook(group, bucket)

    train_step = loop.train_step

    def watched_step(micro_batches: Any) -> None:
        loaded = list(micro_batches)  # what a loader does on the CPU is no wait for the device
        with ExitStack() as stack:
            for name in WAITS if loop.progress.steps_done else ():  # a process's first step looks at the model
                stack.enter_context(patch.object(Tensor, name, counted(name)))
            train_step(iter(loaded))

    loop.train_step = watched_step
    loop.trained.model.module.register_comm_hook(None, hook)
    with count_collectives() as collectives:
        loop.train_epoch()
    return waits, collectives, buckets


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_waits_for_nothing_and_sends_one_small_message_beside_the_gradients(loss, micro_batches, tmp_path):
    steps = 4
    for waits, collectives, buckets in run_ranks(2, count, str(tmp_path), loss, micro_batches):
        assert not waits
        assert buckets == steps  # the gradients: once a batch, however many micro-batches it has
        assert collectives == {"all_reduce": buckets + steps * (1 + LOSSES[loss][1])}


# -- a step of the user's own ---------------------------------------------------------------------


class Parts(nn.Module):
    """A model whose steps use its attributes and methods, and count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.num_classes = CLASSES
        self.calls = 0
        self.encoder = nn.Sequential(nn.Linear(LENGTH, 6), nn.LayerNorm(6), nn.Linear(6, 6))
        self.head = nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(1))  # of fsdp's root, whatever is called

    def encode(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.encoder(x) * self.scale


def by_methods(model: nn.Module, batch: Any) -> dict[str, Any]:
    by_methods.calls += 1
    features, target = batch
    scores = model.head(model.encode(features))
    return {"loss": F.binary_cross_entropy_with_logits(scores, F.one_hot(target, model.num_classes).float())}


by_methods.calls = 0


def summing(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"loss": F.cross_entropy(model.head(model.encode(batch[0])), batch[1], reduction="sum")}


def contrasting(model: nn.Module, batch: Any) -> dict[str, Any]:
    features = model.head(model.encode(batch[0]))
    return {"loss": F.cross_entropy(features @ features.T, torch.arange(len(features)))}


def needing_pairs(model: nn.Module, batch: Any) -> dict[str, Any]:
    one, other = model.head(model.encode(batch[0])).reshape(2, 2, -1)
    return {"loss": (one - other).square().mean()}


def drawing(model: nn.Module, batch: Any) -> dict[str, Any]:
    return {"loss": (model.head(model.encode(batch[0])) * torch.rand(())).mean()}


def claiming(model: nn.Module, batch: Any) -> dict[str, Any]:
    return contrasting(model, batch) | {"weight": len(batch[0])}


def own_job(step: Any, strategy: Any = "ddp") -> Job:
    net = Parts()
    torch.manual_seed(5)
    data = Samples(torch.randn(9, LENGTH), torch.randint(CLASSES, (9,)))  # the last batch has one
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    trainer = {"net": net, "step": step, "optimizer": optimizer, "strategy": strategy}
    return {"trainer": trainer, "train": data, "batch_size": 8 if step is not by_methods else 4}


def own_steps(rank: int, world_size: int, folder: str) -> tuple[list[Any], dict[str, str]]:
    """Weights, and calls that model and step counted, by strategy; what was said of other steps."""
    results = []
    for strategy in ("ddp", Fsdp()):
        by_methods.calls = 0
        loop = make_loop(f"{folder}/{strategy}", own_job(by_methods, strategy))
        loop.train_epoch()
        loop.trained.model.share_buffers()
        results.append((loop.trained.model.weights(), (loop.trained.model.bare.calls, by_methods.calls)))
    said = {}
    for step in (summing, contrasting, needing_pairs, drawing, claiming):
        errors = io.StringIO()
        with redirect_stderr(errors):
            try:
                make_loop(f"{folder}/{step.__name__}", own_job(step)).train_epoch()
            except UserError as error:
                print(error, file=errors)
        said[step.__name__] = errors.getvalue()
    return results, said


def test_a_step_has_the_bare_model_and_its_loss_is_tried_on_parts(tmp_path):
    found = run_ranks(2, own_steps, str(tmp_path))
    job = own_job(by_methods)
    net, data, optimizer = job["trainer"]["net"], job["train"], job["trainer"]["optimizer"]
    for chosen in torch.arange(9).split(4):
        optimizer.zero_grad()
        by_methods(net, (data.features[chosen], data.target[chosen]))["loss"].backward()
        optimizer.step()
    for weights, _ in found[0][0]:
        for name, value in net.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)
    for results, said in found:
        assert [calls for _, calls in results] == [(3, 3)] * 2  # trying leaves no trace
        assert "make" in said["summing"]
        assert "it is their sum: return their mean" in said["summing"]
        assert "not a mean over samples, so it can't be computed in parts" in said["contrasting"]
        assert "the step fails on 2 samples of a batch (RuntimeError: shape" in said["needing_pairs"]
        assert said["drawing"].startswith("the step's loss differs each time, as if it drew random numbers")
        assert said["claiming"] == ""  # it has said its weight


WRONG_RESULTS: dict[str, tuple[Any, str]] = {
    "a tensor": (torch.ones(()), "step must return a dict with a `loss`, it returned float32"),
    "no loss": ({"los": 1}, "step must return a dict with a `loss`, it returned a dict with keys los"),
    "a key": ({"loss": torch.ones(()), "weigth": 3}, "unknown key 'weigth'; did you mean weight[?] known: loss, pred"),
    "a number": ({"loss": 0.5}, r"loss must be a tensor, it is the float 0.5; `.item\(\)` loses its"),
    "many": ({"loss": torch.ones(2)}, "the step's loss must be one number, it has shape"),
    "no number": ({"loss": torch.ones(()), "weight": "all"}, "the step's weight must be a number, it is str"),
    "weights": ({"loss": torch.ones(()), "weight": [1, 2]}, "the step's weight must be one number, it has shape"),
}


@pytest.mark.parametrize("kind", WRONG_RESULTS)
def test_what_a_step_must_not_return(kind):
    result, says = WRONG_RESULTS[kind]
    with pytest.raises(UserError, match=says):
        user_step(lambda model, batch: result)(nn.Identity(), MicroBatch(torch.ones(2), 2, 2))


def test_a_step_that_returns_a_weight_returns_it_always():
    def step(model: nn.Module, batch: Tensor) -> dict[str, Any]:
        return {"loss": batch.mean()} | ({"weight": 2} if batch.sum() > 0 else {})

    own = user_step(step)
    own(nn.Identity(), MicroBatch(torch.ones(2), 2, 2))
    own(nn.Identity().eval(), MicroBatch(-torch.ones(2), 2, 2))  # evaluated it may be another
    with pytest.raises(UserError, match="a `weight` for some batches but not for others"):
        own(nn.Identity(), MicroBatch(-torch.ones(2), 2, 2))
