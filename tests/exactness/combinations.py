"""Trainings put together at random from what goes through a DataLoader, a Module, an optimizer, a loss and a metric.

`draw(seed)` names the parts; the tables hold them. test_combinations.py trains each with dtrain and with a plain loop.
"""

from __future__ import annotations

import random
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset, default_collate
from torchmetrics import Accuracy, F1Score, MeanMetric, MeanSquaredError, MetricCollection, PearsonCorrCoef, R2Score
from torchmetrics.classification import MulticlassAUROC, MulticlassPrecision

from dtrain import Fsdp, WeightedMean

SIZE, VAL_SIZE, FEATURES, CLASSES, EPOCHS = 23, 14, 6, 3, 2
DROPPED = {4, 12}  # by collate functions that leave samples out: never a whole batch
CLASS_WEIGHT, POSITIVE_WEIGHT = torch.tensor([0.3, 1.0, 2.5]), torch.tensor([2.0, 0.5, 1.0])


@dataclass(frozen=True)
class Combination:
    """A key of each table below, and how the training goes."""

    seed: int
    loader: str
    val_loader: str
    batch: str
    loss: str
    weighs: bool  # whether a step says of how many units its loss is the mean
    model: str
    optimizer: str
    scheduler: str
    metrics: tuple[str, ...]
    strategy: str
    limits: tuple[str, ...]
    batch_size: int
    micro_batch_size: int | None
    workers: int
    ranks: int
    stop_after: int | None  # the step after which a stop is asked for: the process ends after the next
    resumed_ranks: int

    @property
    def is_step(self) -> bool:
        """Whether a batch is no (features, target), so that a step must say what is done."""
        return BATCHES[self.batch].is_step

    @property
    def is_cut(self) -> bool:
        """Whether a rank or a micro-batch has a part of a batch."""
        return max(self.ranks, self.resumed_ranks) > 1 or self.micro_batch_size is not None


def draw(seed: int) -> Combination:
    """The combination of this number."""
    rng = random.Random(seed)
    loss, batch = rng.choice(list(LOSSES)), rng.choice(list(BATCHES))
    model = rng.choice(list(MODELS))
    strategies = ["ddp"] if model == "experts" else ["ddp", "ddp", "ddp", *STRATEGIES]
    optimizers = ["SGD", "Adagrad", "SparseAdam"] if model == "sparse" else sorted(OPTIMIZERS.keys() - {"SparseAdam"})
    metrics = [name for name, metric in METRICS.items() if metric.task in (LOSSES[loss].task, "any")]
    metrics += ["size"] if BATCHES[batch].is_step else []
    stop_after = rng.choice([None, None, 0, 1, 3, 5])
    ranks = rng.choice([1, 2, 2, 3, 3])
    return Combination(
        seed=seed,
        loader=rng.choice(list(LOADERS)),
        val_loader=rng.choice(list(LOADERS)),
        batch=batch,
        loss=loss,
        weighs=rng.random() < 0.7 and loss not in ("sum", "root"),
        model=model,
        optimizer=rng.choice(optimizers),
        scheduler=rng.choice(list(SCHEDULERS)),
        metrics=tuple(sorted(rng.sample(metrics, rng.randrange(3)))),
        strategy=rng.choice(strategies),
        limits=tuple(sorted(rng.sample(["clip_norm", "clip_value", "ema"], rng.choice([0, 0, 1, 2])))),
        batch_size=rng.choice([4, 5, 9]),  # an epoch's last batches are short, and hold more than what is dropped
        micro_batch_size=rng.choice([None, None, 1, 2, 3]),
        workers=rng.choice([0, 0, 0, 0, 2]),
        ranks=ranks,
        stop_after=stop_after,
        resumed_ranks=ranks if stop_after is None else rng.choice([1, 2, 3]),
    )


# --- batches: what a sample is, how a batch is made of samples, and where a step finds features and target


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Record:
    x: Tensor
    y: Tensor
    name: str = ""


class Kind(NamedTuple):
    """Of batches.

    Attributes:
        sample: of the sample's index, features and target.
        collate: makes a batch of a list of them.
        open: features and target in a batch, for a step; None where a batch is the two already.
        rows: whether a sample has several rows, each another number of them.
    """

    sample: Callable[[int, Tensor, Tensor], Any]
    collate: Callable[[list[Any]], Any] | None = None
    open: Callable[[Any], tuple[Tensor, Tensor]] | None = None
    rows: bool = False

    @property
    def is_step(self) -> bool:
        return self.open is not None

    @property
    def is_uneven(self) -> bool:
        """Whether a batch may have another number of rows than of samples."""
        return self.rows or self.collate is dropping


def dropping(samples: list[Any]) -> Any:
    kept = [sample[1:] for sample in samples if sample[0] not in DROPPED]
    return default_collate(kept) if kept else None


def records(samples: list[Any]) -> Record:
    return Record(*default_collate([(each.x, each.y) for each in samples]), name="batch")


def joined(samples: list[Any]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in samples]), torch.cat([y for _, y in samples])


def graph(samples: list[Any]) -> dict[str, Tensor]:
    x, y = joined(samples)
    return {"x": x, "y": y, "sizes": torch.tensor([len(part) for part, _ in samples])}


def by_key(batch: Any) -> tuple[Tensor, Tensor]:
    return batch["x"], batch["y"]


def by_name(batch: Any) -> tuple[Tensor, Tensor]:
    return batch.x, batch.y


BATCHES = {
    "tuple": Kind(lambda i, x, y: (x, y)),
    "list": Kind(lambda i, x, y: [x, y]),
    "numpy": Kind(lambda i, x, y: (x.numpy(), y.numpy())),
    "dropped": Kind(lambda i, x, y: (i, x, y), dropping),
    "rows": Kind(lambda i, x, y: (x, y), joined, rows=True),
    "dict": Kind(lambda i, x, y: {"x": x, "y": y, "name": f"sample {i}"}, open=by_key),
    "nested": Kind(lambda i, x, y: ([{"x": x}], (y, i)), open=lambda batch: (batch[0][0]["x"], batch[1][0])),
    "namedtuple": Kind(lambda i, x, y: Pair(x, y), open=by_name),
    "dataclass": Kind(lambda i, x, y: Record(x, y), records, by_name),
    "UserDict": Kind(lambda i, x, y: UserDict(x=x, y=y), open=by_key),
    "graph": Kind(lambda i, x, y: (x, y), graph, by_key, rows=True),
}


# --- datasets and loaders


class Samples(Dataset):
    """By a number, a name or a pair; `begin` numbers the first."""

    def __init__(self, combination: Combination, size: int) -> None:
        loss, self.kind = LOSSES[combination.loss], BATCHES[combination.batch]
        random = torch.Generator().manual_seed(combination.seed + size)
        self.sizes = [1 + i % 3 if self.kind.rows else 1 for i in range(size)]
        rows = sum(self.sizes)
        x = torch.randn(rows, FEATURES, generator=random)
        y = torch.randint(CLASSES, (rows,), generator=random)
        y = y if loss.task == "classes" else torch.rand(rows, CLASSES, generator=random)
        if self.kind.rows:
            self.x, self.y = x.split(self.sizes), y.split(self.sizes)
        else:
            self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, key: Any) -> Any:
        index = int(key.removeprefix("sample ") if isinstance(key, str) else key[0] if isinstance(key, tuple) else key)
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.kind.sample(index, self.x[index], self.y[index])


class Stream(IterableDataset):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        return map(self.samples.__getitem__, range(len(self.samples)))


class Ready(Dataset):
    """Whole batches, each of another size; the first has a single sample."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        collate = self.samples.kind.collate or default_collate
        return collate([self.samples[i] for i in range(3 * index, 4 * index + 1)])


class Names(Sampler):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[str]:
        return (f"sample {(5 * i + 2) % len(self.samples)}" for i in range(len(self.samples) - 3))


class Buckets(Sampler):
    """Batches of several sizes, one of them of one sample; other ones in the next epoch."""

    def __init__(self) -> None:
        self.epoch = 1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Any]]:
        yield from [[(0, 1), (1, 1), (4, 2)], [self.epoch], [5, 6, 7, 8, 9, 10, 11], [2, 2, 12, 13]]

    def __len__(self) -> int:
        return 4


class Twice(DataLoader):
    """A loader with an iteration of its own."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(2):
            yield from super().__iter__()


def loader(combination: Combination, name: str, samples: Samples, order: Sequence[int] | None = None) -> Any:
    """A loader of this name; with `order`, one that shuffles takes it."""
    collate = samples.kind.collate
    arguments: dict[str, Any] = {"num_workers": combination.workers, "collate_fn": collate}
    sized = {"batch_size": combination.batch_size, **arguments}
    return LOADERS[name](samples, sized, arguments, {"shuffle": True} if order is None else {"sampler": order})


LOADERS: dict[str, Callable[[Samples, dict[str, Any], dict[str, Any], dict[str, Any]], Any]] = {
    "shuffle": lambda samples, sized, others, shuffle: DataLoader(samples, **sized, **shuffle),
    "drop_last": lambda samples, sized, others, shuffle: DataLoader(samples, **sized, **shuffle, drop_last=True),
    "in order": lambda samples, sized, others, shuffle: DataLoader(samples, **sized),
    "names": lambda samples, sized, others, shuffle: DataLoader(samples, **sized, sampler=Names(samples)),
    "batch_sampler": lambda samples, sized, others, shuffle: DataLoader(samples, **others, batch_sampler=Buckets()),
    "a list of batches": lambda samples, sized, others, shuffle: list(Ready(samples)),
    "batches": lambda samples, sized, others, shuffle: DataLoader(Ready(samples), batch_size=None),
    "twice": lambda samples, sized, others, shuffle: Twice(samples, **sized),
    "stream": lambda samples, sized, others, shuffle: DataLoader(Stream(samples), **sized),
    "subset": lambda samples, sized, others, shuffle: DataLoader(Subset(samples, range(3, 12)), **sized),
    "concat": lambda samples, sized, others, shuffle: DataLoader(
        ConcatDataset([Subset(samples, [7, 1, 3]), samples]),
        **sized,
        prefetch_factor=3 if others["num_workers"] else None,
    ),
}
READY = {"a list of batches", "batches", "twice"}  # which dtrain gets whole


# --- losses


class Loss(NamedTuple):
    """A loss, and of what it is a mean.

    Attributes:
        units: of predictions and target, what the loss is divided by; None where it can't be put together from parts.
        is_torchs: whether dtrain knows its units; of another it is taken for the mean over samples.
        is_regular: whether each sample counts as much as any other, so that a step needs no weight.
    """

    make: Callable[[], Any]
    task: str
    units: Callable[[Tensor, Tensor], float] | None
    is_torchs: bool = True
    is_regular: bool = True


class Tempered(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.zeros(()))

    def forward(self, predictions: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(predictions * self.temperature.exp(), target)


class Positive(WeightedMean):
    """Of the targets above a half."""

    def units(self, predictions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        weight = (target > 0.5).double()
        return (predictions - target).abs() * weight, weight


def own_mean(predictions: Tensor, target: Tensor) -> Tensor:
    return (predictions - target).abs().pow(1.5).mean(1).mean()


def root(predictions: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(predictions, target).sqrt()


def rows(predictions: Tensor, target: Tensor) -> float:
    return len(predictions)


def elements(predictions: Tensor, target: Tensor) -> float:
    return predictions.numel()


LOSSES = {
    "CrossEntropy": Loss(nn.CrossEntropyLoss, "classes", rows),
    "CrossEntropy, smoothed": Loss(lambda: nn.CrossEntropyLoss(label_smoothing=0.1), "classes", rows),
    "CrossEntropy, weighted": Loss(
        lambda: nn.CrossEntropyLoss(weight=CLASS_WEIGHT),
        "classes",
        lambda predictions, target: float(CLASS_WEIGHT[target].sum()),
        is_regular=False,
    ),
    "CrossEntropy, ignoring": Loss(
        lambda: nn.CrossEntropyLoss(ignore_index=2),
        "classes",
        lambda predictions, target: float((target != 2).sum()),
        is_regular=False,
    ),
    "MultiMargin": Loss(nn.MultiMarginLoss, "classes", rows),
    "Tempered": Loss(Tempered, "classes", rows, is_torchs=False),
    "MSE": Loss(nn.MSELoss, "numbers", elements),
    "sum": Loss(lambda: nn.MSELoss(reduction="sum"), "numbers", rows, is_regular=False),
    "l1_loss": Loss(lambda: F.l1_loss, "numbers", elements),
    "Huber": Loss(lambda: nn.HuberLoss(delta=0.3), "numbers", elements),
    "BCEWithLogits": Loss(lambda: nn.BCEWithLogitsLoss(pos_weight=POSITIVE_WEIGHT), "numbers", elements),
    "own mean": Loss(lambda: own_mean, "numbers", rows, is_torchs=False),
    "WeightedMean": Loss(
        Positive, "numbers", lambda predictions, target: float((target > 0.5).sum()), is_regular=False
    ),
    "root": Loss(lambda: root, "numbers", None, is_torchs=False),
}


# --- models: of FEATURES numbers, CLASSES


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class Frozen(nn.Module):
    """A part that is in eval() and not trained, with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8, momentum=0.5)).requires_grad_(False).eval()
        self.body[1].running_var.uniform_(0.5, 2.0)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


class Embedded(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(20, CLASSES if sparse else 5, sparse=sparse)
        self.head = None if sparse else nn.Linear(5 * FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found = self.table((4 * x + 10).long().clamp(0, 19))
        return found.mean(1) if self.head is None else self.head(found.flatten(1))


class Complex(nn.Module):
    """A complex parameter, and one integer that is none to train."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=torch.cfloat))
        self.steps = nn.Parameter(torch.tensor(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = (x.to(torch.cfloat) @ self.factor).abs()
        return found / self.steps


class Experts(nn.Module):
    """Each sample goes to the expert that its first feature names: a batch may leave some out."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(FEATURES, CLASSES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        names = (x[:, 0] > -0.8).long() + (x[:, 0] > 0.8).long()
        found = x.new_zeros(len(x), CLASSES)
        for i, expert in enumerate(self.experts):
            if (names == i).any():
                found = found.index_put((names == i,), expert(x[names == i]))
        return found


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES)),
    "tied": Tied,
    "frozen": Frozen,
    "embedded": Embedded,
    "sparse": lambda: Embedded(sparse=True),
    "complex": Complex,
    "experts": Experts,
}

# --- what trains and measures them

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    # With an epsilon that keeps float32's rounding as small as it is.
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02, eps=1e-3),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, eps=1e-3, weight_decay=0.2),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05, eps=1e-3),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, eps=1e-2),
    "SparseAdam": lambda parameters: torch.optim.SparseAdam(parameters, lr=0.02, eps=1e-3),
}
SCHEDULERS: dict[str, tuple[str, Callable[[torch.optim.Optimizer], Any]]] = {
    "none": ("epoch", lambda optimizer: None),
    "StepLR": ("epoch", lambda optimizer: lr_scheduler.StepLR(optimizer, 1, gamma=0.5)),
    "cosine": ("step", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 40)),
    "warm-up": ("step", lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4))),
    "plateau": ("epoch", lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)),
}
STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": Fsdp(wrap=["Linear"])}
STRATEGIES |= {f"ZeRO {stage}": {"zero_optimization": {"stage": stage}} for stage in (1, 2, 3)}


class Measure(NamedTuple):
    make: Callable[[], Any]
    task: str
    activation: str | None = None
    on_training: bool = True  # by default


def ordered(predictions: Tensor, target: Tensor) -> float:
    """Another one in another order of the samples."""
    return float((predictions[:, 0] * torch.linspace(0.0, 1.0, len(predictions))).sum())


METRICS = {
    "acc": Measure(lambda: Accuracy(task="multiclass", num_classes=CLASSES), "classes"),
    "f1": Measure(lambda: F1Score(task="multiclass", num_classes=CLASSES, average="macro"), "classes"),
    "auroc": Measure(lambda: MulticlassAUROC(CLASSES), "classes", activation="softmax", on_training=False),
    "both": Measure(
        lambda: MetricCollection(
            {"acc": Accuracy(task="multiclass", num_classes=CLASSES), "p": MulticlassPrecision(3)}
        ),
        "classes",
    ),
    "mse": Measure(MeanSquaredError, "numbers"),
    "r2": Measure(lambda: R2Score(multioutput="uniform_average"), "numbers"),
    "pearson": Measure(lambda: PearsonCorrCoef(num_outputs=CLASSES), "numbers"),
    "ordered": Measure(lambda: ordered, "any", on_training=False),
    "size": Measure(MeanMetric, "a step's"),  # of an argument of its own
}
