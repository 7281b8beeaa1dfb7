"""Losses that are no means over samples, cut over ranks and micro-batches, against a plain loop over whole batches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from marks import campaign
from torch import Tensor, nn
from training import Job, Samples, epoch_order, train

from dtrain.errors import UserError
from dtrain.trainer.data.indexed import MicroBatch
from dtrain.trainer.loss.losses import FocalLoss, MulticlassFocalLoss, SCELoss
from dtrain.trainer.loss.step import supervised_step

SEED, EPOCHS, BATCH, NUM_SAMPLES, CLASSES = 5, 2, 11, 34, 4  # last batch of 1: empty shares
WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.7])
IGNORED = -100


def samples(target: Tensor) -> float:
    return len(target)


def class_weight(target: Tensor) -> float:
    return float(WEIGHT[target.clamp(min=0)][target != IGNORED].sum())


def counted(target: Tensor) -> float:
    return int((target != IGNORED).sum())


@dataclass(frozen=True)
class Case:
    """`units` is how many units the batch's loss is the mean of; `kind` is that of the target."""

    loss: Callable[[Tensor, Tensor], Tensor]
    units: Callable[[Tensor], float] = samples
    kind: str = "classes"
    step: Callable[..., dict[str, Any]] | None = None


class Focal(nn.CrossEntropyLoss):
    """A forward of its own, a mean over samples: nothing that the class's own reduction tells about."""

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        each = F.cross_entropy(predictions, target, weight=self.weight, reduction="none")
        return ((1 - torch.exp(-each)) ** 2 * each).mean()


def counting_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    features, target = batch  # a part without a unit has the mean nan
    loss = F.cross_entropy(model(features), target, ignore_index=IGNORED)
    return {"loss": loss, "weight": (target != IGNORED).sum()}


def weighting_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    features, target = batch
    each = F.cross_entropy(model(features), target, reduction="none")
    return {"loss": (each * WEIGHT[target]).sum() / WEIGHT[target].sum(), "weight": float(WEIGHT[target].sum())}


def squares_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    features, target = batch
    return {"loss": F.mse_loss(model(features), target)}


CASES = {
    "mean": Case(nn.CrossEntropyLoss()),
    "class weights": Case(nn.CrossEntropyLoss(weight=WEIGHT), class_weight),
    "ignored": Case(nn.CrossEntropyLoss(ignore_index=IGNORED), counted, "ignored"),
    "all": Case(nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), class_weight, "ignored"),
    "smoothing": Case(nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), class_weight),
    "probabilities": Case(nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), samples, "probabilities"),
    "nll": Case(nn.NLLLoss(weight=WEIGHT), class_weight, "ignored log"),
    "tokens": Case(nn.CrossEntropyLoss(weight=WEIGHT), class_weight, "ignored tokens"),
    "sum": Case(nn.CrossEntropyLoss(reduction="sum")),
    "squares": Case(nn.MSELoss(), samples, "numbers"),
    "squares' sum": Case(nn.MSELoss(reduction="sum"), samples, "numbers"),
    "function": Case(F.cross_entropy, counted, "ignored"),
    "bound function": Case(functools.partial(F.cross_entropy, weight=WEIGHT), class_weight, "ignored"),
    "own forward": Case(Focal(weight=WEIGHT)),
    "shape [1]": Case(lambda predictions, target: F.cross_entropy(predictions, target).reshape(1)),
    "focal": Case(FocalLoss(), Tensor.numel, "probabilities"),
    "focal over classes": Case(MulticlassFocalLoss(weight=WEIGHT), class_weight, "ignored tokens"),
    "symmetric": Case(SCELoss(weight=WEIGHT), class_weight, "ignored"),
    "symmetric sum": Case(SCELoss(weight=WEIGHT, reduction="sum")),
    "step counting": Case(nn.CrossEntropyLoss(), counted, "ignored", counting_step),
    "step weighting": Case(nn.CrossEntropyLoss(weight=WEIGHT), class_weight, "classes", weighting_step),
    "step without weight": Case(nn.MSELoss(), samples, "numbers", squares_step),
}


class Net(nn.Module):
    """Linear over the features, for each position where there are tokens: [N, C] or [N, C, L]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(6, CLASSES)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        scores = self.layer(x).transpose(1, -1)
        return scores.log_softmax(1) if "log" in self.kind else scores


def parts(kind: str) -> tuple[nn.Module, torch.optim.Optimizer, Samples]:
    torch.manual_seed(SEED)
    net = Net(kind)
    shape = (NUM_SAMPLES, 7) if "tokens" in kind else (NUM_SAMPLES,)
    target = torch.randint(CLASSES, shape)
    if "ignored" in kind:
        first, second = epoch_order(NUM_SAMPLES, SEED, epoch=1).split(BATCH)[:2]
        target[first[:6]] = IGNORED  # all of rank 0's share, at 2 ranks and more
        target[second[6:9]] = IGNORED  # a micro-batch at 2 ranks
        if "tokens" in kind:
            target[:, 4:] = IGNORED
    if kind == "probabilities":
        target = torch.randn(NUM_SAMPLES, CLASSES).softmax(1)
    if kind == "numbers":
        target = torch.randn(NUM_SAMPLES, CLASSES)
    net_optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    return net, net_optimizer, Samples(torch.randn(*shape, 6), target)


def job(name: str, micro_batch_size: int) -> Job:
    case = CASES[name]
    net, optimizer, data = parts(case.kind)
    trainer = {"net": net, "optimizer": optimizer, "seed": SEED, "micro_batch_size": micro_batch_size}
    trainer |= {"loss_fn": case.loss} if case.step is None else {"step": case.step}
    return {"trainer": trainer, "train": data, "val": data, "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


def plain_loop(case: Case) -> tuple[list[float], float, dict[str, Tensor]]:
    """Each epoch's training loss, the last validation loss, and the weights."""
    net, optimizer, data = parts(case.kind)

    def losses(order: Tensor, training: bool) -> float:
        total, units = 0.0, 0.0
        for chosen in order.split(BATCH):
            target = data.target[chosen]
            with torch.set_grad_enabled(training):
                loss = case.loss(net(data.features[chosen]), target).reshape(())
            if training:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            total += loss.item() * case.units(target) if case.units(target) else 0.0
            units += case.units(target)
        return total / units

    orders = [epoch_order(NUM_SAMPLES, SEED, epoch) for epoch in range(1, EPOCHS + 1)]
    train_losses = [losses(order, training=True) for order in orders]
    return train_losses, losses(torch.arange(NUM_SAMPLES), training=False), net.state_dict()


@pytest.mark.parametrize("world_size", [campaign(1), campaign(2), 3])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_of_parts_is_the_loss_of_the_whole(name, world_size, tmp_path):
    results = train(world_size, tmp_path, job, name, 3)  # shares of 11, 6 or 4 samples: 4 or 2 micro-batches
    train_losses, val_loss, weights = plain_loop(CASES[name])
    assert all(map(math.isfinite, train_losses))
    for rows, found in results:
        assert [row["train_loss"] for row in rows] == pytest.approx(train_losses, rel=1e-5)
        assert rows[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def nothing_counts(name: str) -> Job:
    made = job(name, 3)
    made["train"].target[epoch_order(NUM_SAMPLES, SEED, epoch=1)[BATCH : 2 * BATCH]] = IGNORED
    return made | {"fit": {"epochs": 1}}


@pytest.mark.parametrize("name", ["ignored", "step counting"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_batch_of_which_nothing_counts_moves_nothing(world_size, name, tmp_path):
    ((_, found), *_) = train(world_size, tmp_path, nothing_counts, name)
    net, optimizer, _ = parts("ignored")
    data = nothing_counts(name)["train"]
    for chosen in epoch_order(NUM_SAMPLES, SEED, epoch=1).split(BATCH):
        loss = F.cross_entropy(net(data.features[chosen]), data.target[chosen], ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()  # torch gives zeros where the mean is nan
        optimizer.step()
    for key, value in net.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)


def test_a_loss_that_gives_no_single_number_is_refused():
    with pytest.raises(UserError, match="reduction='none'"):
        supervised_step(nn.CrossEntropyLoss(reduction="none"))


def contrast(predictions: Tensor, target: Tensor) -> Tensor:
    """Each sample against all others of the batch."""
    scores = predictions @ predictions.T
    return F.cross_entropy(scores, torch.arange(len(scores)))


def hidden_weights(predictions: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(predictions, target, weight=WEIGHT)


class Counting(nn.Module):
    """A mean over samples that remembers its calls, and with `noise` draws random numbers."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(predictions, target)
        return loss + self.noise * torch.rand(()) if self.noise else loss


def step_with(loss_fn: Any, samples: int, is_whole: bool, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(SEED)
    data = torch.randn(samples, CLASSES, dtype=dtype), torch.randint(CLASSES, (samples,))
    supervised_step(loss_fn)(nn.Identity(), MicroBatch(data, samples, 20, is_whole=is_whole))


@pytest.mark.parametrize("loss_fn", [contrast, hidden_weights, functools.partial(contrast)])
def test_a_loss_that_is_no_mean_over_samples_is_refused_where_a_batch_is_cut(loss_fn):
    with pytest.raises(
        UserError, match=r"of 8 samples is \d\.\d+, but its parts of 4 and 4 make .* not a mean over samples"
    ):
        step_with(loss_fn, 8, is_whole=False)
    step_with(loss_fn, 8, is_whole=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_loss_that_may_be_a_mean_is_believed(noise, dtype):
    loss_fn = Counting(noise)
    step_with(loss_fn, 1, is_whole=False, dtype=dtype)  # too few to see
    step_with(loss_fn, 9, is_whole=False, dtype=dtype)
    assert loss_fn.calls == 2
    drawn = torch.rand(())
    step_with(Counting(noise), 9, is_whole=True, dtype=dtype)
    assert torch.rand(()) == drawn  # looking has drawn nothing


# -- what does not fit -------------------------------------------------------------------------------

MISFITS: dict[str, tuple[Any, Any, Tensor, str]] = {
    "dict": (
        nn.CrossEntropyLoss(),
        {"logits": torch.zeros(2, 3)},
        torch.tensor([0, 2]),
        "predictions a dict with keys logits, target int64 [2]; a model that returns a dict is trained by a `step`",
    ),
    "logits": (
        nn.BCELoss(),
        torch.tensor([[0.5], [3.0]]),
        torch.ones(2, 1),
        "the loss BCELoss does not fit: predictions are not all in [0, 1]; predictions float32 [2, 1], target float32 "
        "[2, 1]; BCEWithLogitsLoss takes logits",
    ),
    "dtype": (
        nn.CrossEntropyLoss(),
        torch.zeros(2, 3),
        torch.ones(2),
        "the loss CrossEntropyLoss does not fit: ",
    ),
    "shape": (
        nn.BCEWithLogitsLoss(),
        torch.zeros(2, 1),
        torch.ones(2),
        "predictions float32 [2, 1], target float32 [2]",
    ),
    "class": (
        nn.CrossEntropyLoss(),
        torch.zeros(2, 3),
        torch.tensor([0, 3]),
        "the loss CrossEntropyLoss does not fit: ",
    ),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_a_target_that_the_loss_can_not_take_is_named(kind):
    loss_fn, predictions, target, says = MISFITS[kind]
    step = supervised_step(loss_fn)
    with pytest.raises(UserError) as error:
        step(nn.Identity(), MicroBatch((predictions, target), 2, 2, True))
    assert says in str(error.value)


def test_a_users_own_error_stays_what_it_is():
    def mine(predictions: Tensor, target: Tensor) -> Tensor:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        supervised_step(mine)(nn.Identity(), MicroBatch((torch.zeros(2), torch.zeros(2)), 2, 2, True))
