"""What a batch's loss is the mean of: torch's losses, whole and ragged batches, on any number of ranks."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from marks import campaign
from ranks import count_collectives, run_ranks
from torch import Tensor, nn
from training import Job, Samples, make_loop

from dtrain import Ranks
from dtrain.errors import UserError
from dtrain.trainer.data.batch_samples import num_collated
from dtrain.trainer.data.indexed import MicroBatch
from dtrain.trainer.loss.loss_trial import Pairs, try_step
from dtrain.trainer.loss.step import supervised_step
from dtrain.trainer.loss.user_step import user_step

CLASSES = 4
ROWS = (1, 4, 2, 0, 3, 1, 2, 1)  # of each sample, where the batch is ragged; the last rank's first micro-batch has few
WEIGHT = torch.tensor([0.2, 1.0, 3.0, 0.7])


class Case(NamedTuple):
    loss: Callable[[Any, Any], Tensor]
    target: Callable[[int], Tensor]
    activation: Callable[[Tensor], Tensor] = torch.clone


def numbers(rows: int) -> Tensor:
    return torch.randn(rows, CLASSES)


def signs(rows: int) -> Tensor:
    return numbers(rows).sign()


def shares(rows: int) -> Tensor:
    return numbers(rows).softmax(1)


def classes(rows: int) -> Tensor:
    return torch.randint(CLASSES, (rows,))


def labels(rows: int) -> Tensor:
    return torch.tensor([[1, 3, -1, 0], [2, -1, 0, 0]])[torch.randint(2, (rows,))]


log_softmax = functools.partial(torch.log_softmax, dim=1)
CASES = {
    "MSE": Case(nn.MSELoss(), numbers),
    "MSE of columns": Case(nn.MSELoss(), lambda rows: torch.randn(rows, 1)),
    "sum": Case(nn.MSELoss(reduction="sum"), numbers),
    "L1": Case(nn.L1Loss(), numbers),
    "SmoothL1": Case(nn.SmoothL1Loss(), numbers),
    "Huber": Case(nn.HuberLoss(delta=0.5), numbers),
    "BCE": Case(nn.BCELoss(), shares, torch.sigmoid),
    "BCEWithLogits": Case(nn.BCEWithLogitsLoss(pos_weight=WEIGHT), shares),
    "PoissonNLL": Case(nn.PoissonNLLLoss(), shares),
    "KLDiv": Case(nn.KLDivLoss(), shares, log_softmax),
    "KLDiv of samples": Case(nn.KLDivLoss(reduction="batchmean"), shares, log_softmax),
    "SoftMargin": Case(nn.SoftMarginLoss(), signs),
    "HingeEmbedding": Case(nn.HingeEmbeddingLoss(), signs),
    "CrossEntropy": Case(nn.CrossEntropyLoss(weight=WEIGHT), classes),
    "CrossEntropy of shares": Case(nn.CrossEntropyLoss(weight=WEIGHT), shares),
    "NLL": Case(nn.NLLLoss(ignore_index=2), classes, log_softmax),
    "MultiMargin": Case(nn.MultiMarginLoss(weight=WEIGHT), classes),
    "MultiLabelMargin": Case(nn.MultiLabelMarginLoss(), labels),
    "MultiLabelSoftMargin": Case(nn.MultiLabelSoftMarginLoss(weight=WEIGHT), shares),
    "function": Case(F.l1_loss, numbers),
    "bound function": Case(functools.partial(F.huber_loss, delta=0.5), numbers),
    "bound class function": Case(functools.partial(F.multi_margin_loss, p=2), classes),
}


class Net(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, CLASSES)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.layer(x))


def batch(case: Case, is_regular: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Features and target of a batch's rows, and where each sample's rows end."""
    torch.manual_seed(2)
    ends = torch.tensor([1] * len(ROWS) if is_regular else ROWS).cumsum(0)
    rows = int(ends[-1])
    return torch.randn(rows, 3), case.target(rows), ends


def micro_batches(case: Case, is_regular: bool, rank: int, world_size: int) -> Iterator[MicroBatch]:
    """Two of each rank."""
    features, target, ends = batch(case, is_regular)
    parts = torch.arange(len(ROWS)).tensor_split(2 * world_size)[2 * rank : 2 * rank + 2]
    for i, part in enumerate(parts):
        rows = slice(0 if part[0] == 0 else int(ends[part[0] - 1]), int(ends[part[-1]]))
        yield MicroBatch((features[rows], target[rows]), len(part), len(ROWS), i == 1, False, is_regular)


def gradients(rank: int, world_size: int) -> dict[tuple[str, bool], tuple[Tensor, int]]:
    """Of each loss, of a batch of rows and of a ragged one, and how many collectives it took beside DDP's."""
    net = Net(torch.clone)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    job: Job = {"net": net, "loss_fn": nn.MSELoss(), "optimizer": optimizer}
    with tempfile.TemporaryDirectory() as folder:
        data = Samples(torch.zeros(1, 3), torch.zeros(1))
        loop = make_loop(folder, {"trainer": job, "train": data, "batch_size": 1})
    found = {}
    for name, case in CASES.items():
        net.activation, loop.trained.step = case.activation, supervised_step(case.loss)
        for is_regular in (True, False):
            optimizer.zero_grad()
            with count_collectives() as collectives:
                loop.train_step.backward(micro_batches(case, is_regular, rank, world_size))
            found[name, is_regular] = net.layer.weight.grad.clone(), sum(collectives.values())
    return found


@pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("world_size", [1, campaign(2), 3])
def test_torchs_losses_are_those_of_the_whole_batch(world_size):
    for found in run_ranks(world_size, gradients):
        for (name, is_regular), (gradient, collectives) in found.items():
            case = CASES[name]
            net = Net(case.activation)
            features, target, _ = batch(case, is_regular)
            case.loss(net(features), target).backward()
            torch.testing.assert_close(
                gradient, net.layer.weight.grad, rtol=1e-5, atol=1e-6, msg=f"{name} {is_regular}"
            )
            counts = "sum" not in name and (not is_regular or name in ("CrossEntropy", "NLL"))
            assert collectives == (counts and world_size > 1), name


# -- what mixes samples, or can't be counted ---------------------------------------------------------


def take(loss_fn: Any, predictions: Any, target: Any, **kind: Any) -> Any:
    kind = {"samples": 8, "batch_samples": 16, "is_whole": False} | kind
    return supervised_step(loss_fn)(nn.Identity(), MicroBatch((predictions, target), **kind))


@pytest.mark.parametrize(
    ("loss_fn", "predictions", "target", "says"),
    [
        (
            nn.MSELoss(),
            [8, 1],
            [8],
            r"give both the same shape, predictions.squeeze\(1\); predictions float32 \[8, 1\]",
        ),
        (F.l1_loss, [8], [8, 1], r"L1Loss would compare samples .* target.squeeze\(1\)"),
        (nn.HuberLoss(), [8, 8], [8], "would compare samples with each other's targets"),
        (nn.PoissonNLLLoss(), [8, 2], [], "would compare"),
        (nn.CrossEntropyLoss(), [8], [8], "predictions of one dimension for the classes of a single sample"),
        (nn.TripletMarginLoss(), [8, 2], [8, 2], "more than predictions and target is called in a `step`"),
    ],
)
@pytest.mark.parametrize("is_whole", [True, False])
def test_what_torch_would_broadcast_is_refused_on_any_number_of_ranks(loss_fn, predictions, target, says, is_whole):
    with pytest.raises(UserError, match=says):
        take(loss_fn, torch.zeros(predictions), torch.zeros(target), is_whole=is_whole)


def mean_of_rows(predictions: Any, target: Any) -> Tensor:
    return (predictions - target).square().mean()


def sum_of_rows(predictions: Any, target: Any) -> Tensor:
    return (predictions - target).square().sum()


def alike_at_first(predictions: Any, target: Any) -> Tensor:
    """Weights classes, which shows where losses differ, or gradients."""
    return F.cross_entropy(predictions, target, weight=WEIGHT)


def of_spread(predictions: Any, target: Any) -> Tensor:
    """Undefined for a single sample."""
    return predictions.square().sum() / (len(predictions) - 1)


def of_marked(predictions: Any, target: Any) -> Tensor:
    """The mean over those of target 1: as of a sum, the whole's value is that of its only part with one."""
    return (predictions * target).sum() / target.sum().clamp(min=1.0)


def test_a_loss_of_ones_own_is_tried_where_values_agree_by_accident_or_by_luck():
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(CLASSES, (8,), generator=generator)
    with pytest.raises(UserError, match="has gradients other than those of its parts of 4 and 4"):
        take(alike_at_first, torch.zeros(8, CLASSES), target)
    with pytest.raises(UserError, match=r"it is their sum: return their mean, or set the loss's attribute `reduction`"):
        take(sum_of_rows, torch.ones(8), torch.zeros(8))
    with pytest.raises(UserError, match="it is their sum"):  # a single sample, twice
        take(sum_of_rows, torch.ones(1), torch.zeros(1), samples=1)
    with pytest.raises(UserError, match="its parts of 1 and 1 make inf: it is not a mean"):
        take(of_spread, torch.tensor([1.0, 2.0]), torch.zeros(2), samples=2)
    with pytest.raises(UserError, match=r"its parts of 1 and 1 make 0.5: .*; derive it from dtrain.WeightedMean"):
        take(of_marked, torch.ones(2), torch.tensor([0.0, 1.0]), samples=2)
    step = supervised_step(alike_at_first)
    for number in range(1, 5):
        target = torch.arange(8) % 4 if number < 4 else torch.arange(8) % 3
        data = torch.randn(8, CLASSES, generator=generator), target[torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])]
        part = MicroBatch(data if number < 4 else (data[0], target), 8, 16, is_whole=False)
        if number < 4:
            step(nn.Identity(), part)
        else:
            with pytest.raises(UserError, match="not a mean over samples"):
                step(nn.Identity(), part)


def test_a_loss_of_ones_own_that_can_not_be_cut_is_refused_where_a_batch_is():
    aux = {"scores": torch.ones(8), "aux": torch.tensor(1.0)}

    def with_aux(predictions: Any, target: Any) -> Tensor:
        return mean_of_rows(predictions["scores"], target) + predictions["aux"]

    with pytest.raises(UserError, match=r"shapes \[8\], \[\], \[8\] of 8 samples, with which they don't all begin"):
        take(with_aux, aux, torch.zeros(8))
    take(with_aux, aux, torch.zeros(8), is_whole=True)


def test_a_batch_that_is_no_row_a_sample_needs_a_weight():
    def step(model: nn.Module, data: Any) -> dict[str, Any]:
        return {"loss": data.sum()}

    whole = {"samples": 8, "batch_samples": 16, "is_whole": False, "is_regular": False}
    outcome = user_step(step)(nn.Identity(), MicroBatch(torch.ones(8), **whole))
    assert outcome.weight == 8
    outcome = user_step(step)(nn.Identity(), MicroBatch(torch.ones(9), **whole | {"is_whole": True}))
    assert outcome.weight == 8
    with pytest.raises(UserError, match=r"8 samples, a part of a batch, .* shapes \[9\]: .* let the step return"):
        user_step(step)(nn.Identity(), MicroBatch(torch.ones(9), **whole))
    loss_fn = supervised_step(mean_of_rows)
    part = MicroBatch((torch.ones(9, 8), torch.ones(8)), **whole)
    with pytest.raises(UserError, match=r"shapes \[9, 8\], \[8\]: .* derive the loss from dtrain.WeightedMean"):
        loss_fn(lambda features: features[0], part)


def test_a_batch_of_lists_with_an_entry_a_sample_is_tried_in_parts(capsys):
    """As detection has them: images of any size, and dicts of what is in each."""
    sizes = [2, 5, 3]
    batch = [torch.ones(3, size) for size in sizes], [{"boxes": torch.ones(size, 4)} for size in sizes]
    whole = {"samples": 3, "batch_samples": 6, "is_whole": False, "is_regular": False}

    def of_samples(data: Any) -> float:
        return sum(float(boxes["boxes"].sum()) for boxes in data[1]) / len(data[0])

    def of_boxes(data: Any) -> float:
        return sum(float(image.sum()) for image in data[0]) / sum(len(boxes["boxes"]) for boxes in data[1]) ** 2

    outcome = user_step(lambda model, data: {"loss": torch.tensor(2.0)})(nn.Identity(), MicroBatch(batch, **whole))
    assert (outcome.total, outcome.weight) == (6, 3)
    cpu = torch.device("cpu")
    try_step(of_samples, batch, 3, cpu, is_coarse=False)
    as_they_are = list(zip(*batch, strict=True))
    assert (num_collated(as_they_are, 3), num_collated(as_they_are[:2], 3), num_collated(as_they_are[:1], 1)) == (
        3,
        2,
        1,
    )
    try_step(lambda data: of_samples(tuple(zip(*data, strict=True))), as_they_are, 3, cpu, is_coarse=False)
    try_step(of_samples, (("one", "two", "three"), batch[1], [1, 2, 3]), 3, cpu, is_coarse=False)
    with pytest.raises(UserError, match="not a mean over samples"):
        try_step(of_boxes, batch, 3, cpu, is_coarse=False)
    assert not capsys.readouterr().err
    pairs = Pairs()
    for number, one in enumerate(([batch[0][:1], batch[1][:1]], [batch[0][1:2], batch[1][1:2]])):
        joined, samples = pairs.of(one, 1)
        assert (samples, [len(part) for part in joined]) == (number + 1, [number + 1] * 2)
    assert pairs.of([(torch.ones(2, 2), torch.ones(()))], 1)[1] == 1  # other ones, which can't be joined with them
    assert len(pairs.of([(torch.ones(3, 2), torch.ones(()))], 1)[0]) == 2  # samples as they are


def test_what_may_hold_its_samples_in_two_ways_is_tried_in_both(capsys):
    """Two lists of two tensors, each of two rows: two samples are their rows, or their entries."""
    batch, cpu = ([torch.randn(2, 4), torch.randn(2, 4)], [torch.rand(2), torch.rand(2)]), torch.device("cpu")

    def of_entries(data: Any) -> float:
        return sum(float(x.sum() * y.sum()) for x, y in zip(*data, strict=True)) / len(data[0])

    def of_rows(data: Any) -> float:
        return float((data[0][0].sum(1) * data[1][0] * data[1][1]).mean())

    def of_neither(data: Any) -> float:
        return of_entries(data) ** 2 + of_rows(data) ** 2

    try_step(of_entries, batch, 2, cpu, is_coarse=False)
    try_step(of_rows, batch, 2, cpu, is_coarse=False)
    with pytest.raises(UserError, match=r"not a mean over samples|fails on 1 samples"):
        try_step(of_neither, batch, 2, cpu, is_coarse=False)
    assert not capsys.readouterr().err
    try_step(of_neither, batch, 2, cpu, is_coarse=False, is_forward_collective=True)
    assert "can't tell which lists have an entry for each of 2 samples" in capsys.readouterr().err


def weighed(rank: int, world_size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Gradients of an own loop: of methods of the model, and of a ragged batch; and what is refused."""
    ranks = Ranks(device="cpu")
    net = ranks.wrap(Net(torch.clone))
    ranks._hand.part = next(iter(micro_batches(CASES["MSE"], True, rank, world_size)))
    by_method = []
    for _ in range(2):  # once called, once not
        net.zero_grad()
        ranks.scale_loss(net.layer(ranks._hand.part.data[0]).square().mean()).backward()
        by_method.append(net.layer.weight.grad.clone())
    ranks._hand.part = MicroBatch(ranks._hand.part.data, ranks._hand.part.samples, 8, is_whole=False, is_regular=False)
    net.zero_grad()
    ranks.scale_loss(net(ranks._hand.part.data[0]).square().mean()).backward()
    ranks._hand.part = MicroBatch(torch.ones(9), 1, 8, is_whole=False, is_regular=False)
    with pytest.raises(UserError) as refused:
        ranks.scale_loss(net(torch.ones(9, 3)).mean())
    assert by_method[0].equal(by_method[1])
    return by_method[0], net.layer.weight.grad, str(refused.value)


def test_a_loop_of_ones_own_weighs_what_its_batches_hold():
    found = run_ranks(2, weighed)
    features = [next(iter(micro_batches(CASES["MSE"], True, rank, 2))).data[0] for rank in range(2)]
    net = Net(torch.clone)
    # Two of a rank's samples, of 8 in the batch; and as many as there are, where that is found by a sum.
    torch.cat([net(each).square() for each in features]).mean().backward()
    for half, whole, refused in found:
        torch.testing.assert_close(half, net.layer.weight.grad / 2, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(whole, net.layer.weight.grad, rtol=1e-5, atol=1e-7)
        assert "pass Ranks.scale_loss the `units`" in refused
