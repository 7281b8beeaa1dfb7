"""Datasets without a length: each sample once at any number of ranks and loading processes, and where they go on."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter, UserList
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from command import JOB
from marks import campaign
from ranks import run_ranks
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from torchmetrics import Accuracy
from training import Job, approximately, differences, final_state, timeless, train

from dtrain.errors import UserError
from dtrain.monitoring.screen import Rate, Screen
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Beat, Heartbeat
from dtrain.trainer.checkpoint.codec import flatten
from dtrain.trainer.data.indexed import Source
from dtrain.trainer.data.sampler import Sampling
from dtrain.trainer.data.workers import Processes
from dtrain.trainer.distributed.world import World, join_world
from dtrain.trainer.streams.batches import StreamBatches
from dtrain.trainer.streams.shares import StreamShares
from dtrain.trainer.trainer import Trainer

NUM_SAMPLES, BATCH, SEED, EPOCHS = 38, 9, 3, 2  # the last batch has 2: on three ranks one has none
STEPS = 5
torch.manual_seed(SEED)
FEATURES, TARGET = torch.randn(NUM_SAMPLES, 4), torch.randint(3, (NUM_SAMPLES,))


@dataclass(frozen=True)
class Kind:
    """What a stream does."""

    split: str | None = None  # among the shards: "evenly", "unevenly" (all but two have nothing), None: not at all
    state: str | None = None  # who keeps one: the "dataset" or its "iterator"
    shuffled: bool = False  # by the generators that dtrain seeds, as its iteration begins
    noise: float = 0.0


def part(indices: list[int], split: str | None, shard: int, num_shards: int) -> list[int]:
    """The samples of a shard of a stream that splits itself."""
    if split == "evenly":
        return indices[shard::num_shards]
    cut = NUM_SAMPLES * 2 // 3
    return [indices[:cut], indices[cut:], *([] for _ in range(num_shards - 2))][shard]


class Numbers(IterableDataset):
    """Samples (index, features, target, numbers drawn). With `reads`, it writes there each index that is read."""

    def __init__(self, kind: Kind, reads: Path | None = None) -> None:
        self.kind, self.reads = kind, reads
        self.epoch = 0
        self.place = 0
        if kind.state == "dataset":
            self.state_dict, self.load_state_dict = self._state_dict, self._load_state_dict

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        start, self.place = self.place, 0  # what was loaded holds for one iteration
        if self.kind.state == "iterator":
            return NumbersIterator(self)
        return self._generate(start)

    def _generate(self, start: int) -> Iterator[Any]:
        order = self.order()
        for self.place in range(start + 1, len(order) + 1):
            yield self.sample(order[self.place - 1])
        self.place = 0

    def order(self) -> list[int]:
        indices = list(range(NUM_SAMPLES))
        if self.kind.shuffled:
            random.shuffle(indices)
        elif self.kind.state:
            indices = np.roll(indices, self.epoch).tolist()
        if self.kind.split:
            info = get_worker_info()
            return part(indices, self.kind.split, info.id, info.num_workers)
        return indices

    def sample(self, index: int) -> Any:
        if self.reads is not None:
            with self.reads.open("a") as file:
                file.write(f"{index}\n")
        drawn = torch.tensor([float(torch.rand(())), np.random.rand(), random.random()])
        return index, FEATURES[index] + self.kind.noise * drawn.sum(), TARGET[index], drawn

    def _state_dict(self) -> dict[str, Any]:
        return {"place": torch.tensor(self.place)}

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = int(state["place"])


class NumbersIterator:
    """Its state is one list that changes: what was handed out must not change with it."""

    def __init__(self, stream: Numbers) -> None:
        self.stream, self.order, self.state = stream, stream.order(), [0]

    def __iter__(self) -> NumbersIterator:
        return self

    def __next__(self) -> Any:
        if self.state[0] == len(self.order):
            raise StopIteration
        self.state[0] += 1
        return self.stream.sample(self.order[self.state[0] - 1])

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["place"]


def alone() -> World:
    return World(0, 1, torch.device("cpu"))


def stream_batches(
    world: World,
    dataset: Any,
    workers: int = 0,
    micro_batch_size: int | None = None,
    batch: int = BATCH,
    fill: bool = True,
) -> StreamBatches:
    source = Source(dataset, batch, shuffle=True, processes=Processes(workers))
    return StreamBatches(StreamShares(source, world, SEED, micro_batch_size, fill_empty=fill), world, fill_empty=fill)


Step = tuple[int, list[int], list[list[int]], dict[int, list[float]]]


def read(batches: StreamBatches, epoch: int, first_step: int = 0) -> list[Step]:
    """By step: the batch's samples; this rank's parts' sizes, its samples, and what was drawn for each."""
    seen = []
    for batch in batches.epoch(epoch, first_step):
        sizes, own, drawn = [], [], {}
        for micro_batch in batch.micro_batches:
            indices, _, _, values = micro_batch.data
            assert micro_batch.batch_samples == batch.samples
            assert micro_batch.is_whole == (micro_batch.samples == batch.samples)
            sizes.append(micro_batch.samples)
            if micro_batch.samples:
                own.append(indices.tolist())
                drawn |= dict(zip(indices.tolist(), values.tolist(), strict=True))
        seen.append((batch.samples, sizes, own, drawn))
    return seen


def read_as_rank(
    rank: int, world_size: int, kind: Kind, workers: int, micro_batch_size: int | None
) -> list[list[Step]]:
    batches = stream_batches(join_world("cpu"), Numbers(kind), workers, micro_batch_size)
    return [read(batches, epoch) for epoch in (1, 2)]


# -- plain streams -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn_alone() -> dict[int, dict[int, list[float]]]:
    """By epoch and sample, what is drawn for it in one process."""
    batches = stream_batches(alone(), Numbers(Kind()))
    return {epoch: {i: d for step in read(batches, epoch) for i, d in step[3].items()} for epoch in (1, 2)}


@pytest.mark.parametrize(
    ("world_size", "workers", "micro_batch_size"),
    [(1, 2, 4), (2, 0, None), (2, 2, 2), (3, 0, 1), (3, 2, None)],
)
def test_a_plain_stream_gives_the_batches_that_a_loop_over_it_does(world_size, workers, micro_batch_size, drawn_alone):
    ranks = run_ranks(world_size, read_as_rank, Kind(), workers, micro_batch_size)
    expected = torch.arange(NUM_SAMPLES).split(BATCH)
    for epoch in (1, 2):
        steps = list(zip(*[rank[epoch - 1] for rank in ranks], strict=True))
        assert len(steps) == len(expected)
        for batch, step in zip(expected, steps, strict=True):
            assert {samples for samples, *_ in step} == {len(batch)}
            assert [i for _, _, parts, _ in step for part in parts for i in part] == batch.tolist()
            largest_share = -(-len(batch) // world_size)
            count = -(-largest_share // micro_batch_size) if micro_batch_size else 1
            assert {len(sizes) for _, sizes, *_ in step} == {count}
            assert max(size for _, sizes, *_ in step for size in sizes) <= (micro_batch_size or largest_share)
        assert {i: d for step in steps for _, _, _, drawn in step for i, d in drawn.items()} == drawn_alone[epoch]


def test_each_sample_of_a_stream_draws_numbers_of_its_own(drawn_alone):
    values = np.array([drawn for epoch in (1, 2) for drawn in drawn_alone[epoch].values()])
    assert len(set(values.ravel())) == values.size


@pytest.mark.parametrize("split", [None, "evenly"])
def test_a_stream_shuffles_itself_alike_everywhere(split):
    for epoch in zip(*run_ranks(2, read_as_rank, Kind(split, shuffled=True), 2, None), strict=True):
        indices = [i for rank in epoch for step in rank for part in step[2] for i in part]
        assert sorted(indices) == list(range(NUM_SAMPLES))
        assert indices != sorted(indices)


class SplitsByRank(Numbers):
    """What dtrain can't know, and what would lose samples: each rank has other ones."""

    def order(self) -> list[int]:
        return list(range(NUM_SAMPLES))[dist.get_rank() :: dist.get_world_size()]


class AsksLate(Numbers):
    def sample(self, index: int) -> Any:
        if index == 3:
            assert get_worker_info().num_workers
        return super().sample(index)


def wrong_stream(rank: int, world_size: int, dataset: type[Numbers]) -> str:
    with pytest.raises(UserError) as error:
        read(stream_batches(join_world("cpu"), dataset(Kind()), workers=1), 1)
    return str(error.value)


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        (SplitsByRank, "SplitsByRank does not give all processes the same samples in epoch 1"),
        (AsksLate, "AsksLate asked get_worker_info() for num_workers after its first sample"),
    ],
)
def test_a_stream_that_is_neither_whole_nor_split_is_refused(dataset, says):
    for message in run_ranks(2, wrong_stream, dataset):
        assert message.startswith(says)
        assert "Traceback" not in message


# -- streams that split themselves ---------------------------------------------------------------


def shares_of_union(split: str, world_size: int, workers: int, batch: int = BATCH) -> list[list[list[int]]]:
    """By step and rank, the samples: each rank takes its share from its processes in turn, from those that have any."""
    workers = max(1, workers)
    queues = [part(list(range(NUM_SAMPLES)), split, s, world_size * workers) for s in range(world_size * workers)]
    turns = [0] * world_size
    steps = []
    while any(queues):
        steps.append([])
        for rank in range(world_size):
            own = queues[rank * workers : (rank + 1) * workers]
            chosen = next(((turns[rank] + i) % workers for i in range(workers) if own[(turns[rank] + i) % workers]), 0)
            nominal = batch // world_size + (rank < batch % world_size)
            steps[-1].append(own[chosen][:nominal])
            del own[chosen][:nominal]
            turns[rank] = chosen + 1
    return steps


@pytest.mark.parametrize("split", ["evenly", "unevenly"])
@pytest.mark.parametrize(("world_size", "workers", "micro_batch_size"), [(1, 2, 4), (2, 0, 3), (2, 2, None), (3, 2, 2)])
def test_a_stream_that_splits_itself_is_read_once(world_size, workers, micro_batch_size, split):
    ranks = run_ranks(world_size, read_as_rank, Kind(split), workers, micro_batch_size)
    expected = shares_of_union(split, world_size, workers)
    for epoch in (0, 1):
        steps = list(zip(*[rank[epoch] for rank in ranks], strict=True))  # as many on all ranks
        found = [[[i for p in parts for i in p] for _, _, parts, _ in step] for step in steps]
        assert found == expected
        assert sorted(i for step in found for share in step for i in share) == list(range(NUM_SAMPLES))
        for step, shares in zip(steps, expected, strict=True):
            assert {samples for samples, *_ in step} == {sum(map(len, shares))}
            largest_share = -(-BATCH // world_size)
            count = -(-largest_share // micro_batch_size) if micro_batch_size else 1
            assert {len(sizes) for _, sizes, *_ in step} == {count}
        drawn = [tuple(d) for step in steps for *_, seen in step for d in seen.values()]
        assert len(set(drawn)) >= NUM_SAMPLES - world_size * max(1, workers) + 1  # shards begin with the same draws


# -- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    kind: Kind = Kind()
    workers: int = 0
    micro_batch_size: int | None = None
    batch: int = BATCH
    source: str = "stream"  # "torchdata": in its StatefulDataLoader; "own": a loader of this rank's batches
    random: bool = False
    stop_after_step: int | None = None  # the last rank is asked to stop then: all do after the next
    stop_after_validation: int | None = None
    counted: bool = False


def user_step(model: nn.Module, batch: Any) -> dict[str, Any]:
    _, features, target, _ = batch
    predictions = model(features)
    return {"loss": nn.functional.cross_entropy(predictions, target), "predictions": predictions, "target": target}


def parts(random: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3) if random else nn.Identity(), nn.Tanh(), nn.Linear(8, 3))
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def own_batches(rank: int, world_size: int) -> list[list[int]]:
    """Batches of 4 of a rank's samples; the last of several ranks has one batch alone."""
    samples = list(range(NUM_SAMPLES))
    if world_size > 1:
        samples = samples[-3:] if rank == world_size - 1 else samples[:-3][rank :: world_size - 1]
    return [samples[begin : begin + 4] for begin in range(0, len(samples), 4)]


class OwnLoader:
    """Gives these; with a state where `kind` says so."""

    def __init__(self, kind: Kind, reads: Path | None) -> None:
        self.stream = Numbers(replace(kind, state=None), reads)
        self.done = 0
        if kind.state:
            self.state_dict, self.load_state_dict = self._state_dict, self._load_state_dict

    def __iter__(self) -> Iterator[Any]:
        start, self.done = self.done, 0
        for indices in own_batches(dist.get_rank(), dist.get_world_size())[start:]:
            self.done = max(start, self.done) + 1
            yield torch.utils.data.default_collate([self.stream.sample(index) for index in indices])
        self.done = 0

    def _state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


def job(options: Options) -> Job:
    net, optimizer = parts(options.random)
    metrics = {"acc": Accuracy(task="multiclass", num_classes=3)}
    trainer = {"net": net, "step": user_step, "optimizer": optimizer, "metrics_dict": metrics, "seed": SEED}
    trainer |= {"micro_batch_size": options.micro_batch_size}
    interrupt(options, net, optimizer)
    reads = Path(os.environ[RUN_DIR_VARIABLE], f"read-{dist.get_rank()}") if options.counted else None
    if options.source == "own":
        return {"trainer": trainer, "train": OwnLoader(options.kind, reads), "fit": {"epochs": EPOCHS}}
    stream = Numbers(options.kind, reads)
    if options.source == "torchdata":
        loader = StatefulDataLoader(stream, batch_size=BATCH, num_workers=options.workers)
        return {"trainer": trainer, "train": loader, "fit": {"epochs": EPOCHS}}
    data = {"train": stream, "val": Numbers(options.kind), "batch_size": options.batch, "workers": options.workers}
    return {"trainer": trainer, **data, "fit": {"epochs": EPOCHS}}


def interrupt(options: Options, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    counts: Counter[str] = Counter()

    def ask_to_stop() -> None:
        if (rank := dist.get_rank()) == dist.get_world_size() - 1:
            Heartbeat(RunDir(os.environ[RUN_DIR_VARIABLE]).heartbeat(rank)).stop = signal.SIGTERM

    def after_step(*_: Any) -> None:
        counts["step"] += 1
        if counts["step"] == options.stop_after_step:
            ask_to_stop()

    def after_forward(module: nn.Module, *_: Any) -> None:
        counts["validation"] += not module.training
        if not module.training and counts["validation"] == options.stop_after_validation:
            ask_to_stop()

    optimizer.register_step_post_hook(after_step)
    net.register_forward_hook(after_forward)


def plain_loop(batches: list[list[int]], epochs: int = EPOCHS) -> tuple[list[float], float, dict[str, torch.Tensor]]:
    """The training as everybody would write it: each epoch's loss, the last accuracy on all samples, the weights."""
    net, optimizer = parts(random=False)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for batch in batches:
            loss = nn.functional.cross_entropy(net(FEATURES[batch]), TARGET[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / NUM_SAMPLES)
    accuracy = (net(FEATURES).argmax(1) == TARGET).float().mean().item()
    return losses, accuracy, net.state_dict()


def check_trained(results: list[Any], batches: list[list[int]], validated: bool = True) -> None:
    losses, accuracy, expected = plain_loop(batches)
    for rows, weights in results:
        assert [row["step"] for row in rows] == [len(batches) * epoch for epoch in range(1, EPOCHS + 1)]
        assert [row["train_loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
        if validated:
            assert rows[-1]["val_acc"] == pytest.approx(accuracy, abs=1e-6)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("world_size", "workers", "micro_batch_size"), [(1, 0, None), (1, 2, 2), (2, 0, 2), (3, 2, None), (3, 0, 1)]
)
def test_a_plain_stream_trains_as_a_plain_loop_does(world_size, workers, micro_batch_size, tmp_path):
    results = train(world_size, tmp_path, job, Options(workers=workers, micro_batch_size=micro_batch_size))
    check_trained(results, [batch.tolist() for batch in torch.arange(NUM_SAMPLES).split(BATCH)])


@pytest.mark.parametrize(
    ("split", "world_size", "workers", "micro_batch_size"),
    [
        ("evenly", 1, 2, None),
        ("evenly", 2, 2, 2),
        ("unevenly", 3, 0, None),
        ("unevenly", 3, 0, 2),
        ("unevenly", 2, 2, 3),
    ],
)
def test_ranks_whose_streams_end_early_do_not_hang_the_others(split, world_size, workers, micro_batch_size, tmp_path):
    options = Options(Kind(split), workers, micro_batch_size)
    batches = [[i for share in step for i in share] for step in shares_of_union(split, world_size, workers)]
    check_trained(train(world_size, tmp_path, job, options), batches)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_users_own_loader_gives_each_rank_its_batches(world_size, tmp_path):
    ranks = [own_batches(rank, world_size) for rank in range(world_size)]
    steps = [[i for share in step for i in share] for step in zip_longest(*ranks, fillvalue=[])]
    check_trained(train(world_size, tmp_path, job, Options(source="own")), steps, validated=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_loader_is_read_as_a_dataloader(workers, tmp_path):
    results = train(2, tmp_path, job, Options(workers=workers, source="torchdata"))
    check_trained(results, [batch.tolist() for batch in torch.arange(NUM_SAMPLES).split(BATCH)], validated=False)


# -- stopping and continuing ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Options], dict[str, Any]]:
    """The final state of a run that nothing interrupts; each is made once."""
    made: dict[Any, dict[str, Any]] = {}

    def get(world_size: int, options: Options) -> dict[str, Any]:
        if (world_size, options) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            train(world_size, folder, job, options)
            made[world_size, options] = final_state(folder)
        return made[world_size, options]

    return get


NOISY = Kind(noise=0.1)
RESUMED = {
    "plain": (2, Options(NOISY, random=True), [2]),
    "plain, read again": (3, Options(replace(NOISY, shuffled=True), 2, random=True), [1, 4]),
    "plain, its own state": (2, Options(replace(NOISY, state="dataset"), random=True), [3]),
    "plain, its iterator's state": (2, Options(replace(NOISY, state="iterator"), 2, random=True), [1, 1]),
    "split, read again": (2, Options(replace(NOISY, split="evenly", shuffled=True), 2, random=True), [2, 2, 5]),
    "split, its own state": (2, Options(replace(NOISY, split="unevenly", state="dataset"), 2, random=True), [3, 1, 6]),
    "split, its iterator's state": (
        3,
        Options(replace(NOISY, split="unevenly", state="iterator"), 0, random=True),
        [3],
    ),
    "torchdata": (1, Options(replace(NOISY, state="dataset"), 2, source="torchdata"), [2]),
    "own, read again": (2, Options(NOISY, source="own", random=True), [3]),
    "own, its state": (2, Options(replace(NOISY, state="dataset"), source="own", random=True), [1, 5]),
}


IN_TEST = ("plain, its own state", "split, read again", "torchdata", "own, its state")


@pytest.mark.parametrize("name", [*IN_TEST, *(campaign(name) for name in RESUMED if name not in IN_TEST)])
def test_a_stream_goes_on_where_it_stopped_to_the_bit(name, uninterrupted, tmp_path):
    world_size, options, stops = RESUMED[name]
    for stop in stops:
        assert train(world_size, tmp_path, job, replace(options, stop_after_step=stop)) == [None] * world_size
    train(world_size, tmp_path, job, options)
    assert differences(final_state(tmp_path), uninterrupted(world_size, options)) == []


def test_a_stop_in_validation_reads_no_epoch_again(uninterrupted, tmp_path):
    options = Options(NOISY, random=True, batch=NUM_SAMPLES // 2)
    assert train(2, tmp_path, job, replace(options, stop_after_validation=1)) == [None, None]
    train(2, tmp_path, job, replace(options, counted=True))
    assert differences(final_state(tmp_path), uninterrupted(2, options)) == []
    assert len((tmp_path / "read-0").read_text().split()) == NUM_SAMPLES  # the second epoch's alone


@pytest.mark.parametrize("state", ["dataset", "iterator"])
@pytest.mark.parametrize("split", [None, "evenly"])
def test_a_stream_with_a_state_is_not_read_again(split, state, tmp_path):
    options = Options(Kind(split, state), counted=True)
    train(2, tmp_path, job, replace(options, stop_after_step=2, counted=False))  # 3 steps of 9
    train(2, tmp_path, job, options)
    reads = sum(len((tmp_path / f"read-{rank}").read_text().split()) for rank in (0, 1))
    readers = 1 if split else 2  # of each sample
    assert reads == readers * (2 * NUM_SAMPLES - 3 * BATCH)


@pytest.mark.parametrize(
    ("before", "after", "state"),
    [
        ((2, 0), (3, 2), None),
        ((3, 2), (1, 0), "dataset"),
        campaign((1, 2), (2, 0), None),
        campaign((2, 0), (3, 2), "dataset"),
    ],
)
def test_a_plain_stream_goes_on_at_another_size(before, after, state, tmp_path):
    options = Options(Kind(state=state))
    order = [np.roll(range(NUM_SAMPLES), epoch if state else 0).tolist() for epoch in (1, 2)]
    batches = [[o[begin : begin + BATCH] for begin in range(0, NUM_SAMPLES, BATCH)] for o in order]
    train(before[0], tmp_path, job, replace(options, workers=before[1], stop_after_step=2))
    results = train(after[0], tmp_path, job, replace(options, workers=after[1]))
    net, optimizer = parts(random=False)
    for batch in batches[0] + batches[1]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(FEATURES[batch]), TARGET[batch]).backward()
        optimizer.step()
    for _, weights in results:
        for name, value in net.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def test_a_stream_that_splits_itself_goes_on_at_the_same_size_alone(tmp_path):
    options = Options(Kind("evenly"), 1)
    train(2, tmp_path, job, replace(options, stop_after_step=2))
    for world_size, workers in ((1, 1), (2, 2)):
        with pytest.raises(RuntimeError, match="within an epoch with 2 ranks and 1 loading processes each"):
            train(world_size, tmp_path, job, replace(options, workers=workers))
    assert train(2, tmp_path, job, replace(options, workers=0)) != [None, None]  # the rank itself is one, too


def test_at_an_epochs_end_the_size_may_change(tmp_path):
    options = Options(Kind("evenly"), 1)
    train(2, tmp_path, job, replace(options, stop_after_validation=1))
    ((rows, _),) = train(1, tmp_path, job, replace(options, workers=0))
    assert [row["epoch"] for row in rows] == [1, 2]


def test_a_state_is_data():
    class Odd(Numbers):
        def _state_dict(self) -> dict[str, Any]:
            return {"deep": [1, (b"", {"path": Path("x")})]}

    batches = stream_batches(alone(), Odd(Kind(state="dataset")))
    next(batches.epoch(1))
    with pytest.raises(UserError, match="can't hold data/places/0/state/iterable/deep/1/1/path: it is a PosixPath"):
        flatten(batches.state_dict(), "data/")


# -- evaluation, the command line, and what a user gets wrong ------------------------------------


def test_a_loader_is_evaluated_too():
    net, _ = parts(random=False)
    batches = [(FEATURES[begin : begin + 4], TARGET[begin : begin + 4]) for begin in range(0, NUM_SAMPLES, 4)]
    found = Trainer(net, nn.CrossEntropyLoss(), device="cpu").evaluate(batches)
    expected = nn.functional.cross_entropy(net(FEATURES), TARGET).item()
    assert found["val_loss"] == pytest.approx(expected, rel=1e-6)


STREAM = """
from torch.utils.data import IterableDataset

from data import points


class Points(IterableDataset):
    def __init__(self, size):
        self.size = size

    def __iter__(self):
        yield from points(self.size)
"""


def test_a_job_with_a_stream(project):
    """Its history is that of the same samples with a length, in their own order."""
    project.write("streams.py", STREAM)
    data = {**JOB["data"], "workers": 1, "shuffle": False}
    project.job(data=data)
    command = ["launch", "--gpus", "2", "job.yaml", "launch.device=cpu"]
    assert project.run(*command, "--run-dir", "sized", "data.workers=0").code == 0
    streams = {name: {"_target_": "streams.Points", "size": data[name]["size"]} for name in ("train", "val")}
    project.job(data={**data, **streams})
    done = project.run(*command, "--run-dir", "run")
    assert done.code == 0, done.err
    for row, expected in zip(project.run_dir().rows(), project.run_dir("sized").rows(), strict=True):
        assert timeless(row) == approximately(timeless(expected), rel=1e-6)
    assert project.status()["step"] == 2 * STEPS


def test_progress_without_totals(capsys, monkeypatch):
    rate = Rate()
    for step in (1, 2):
        rate.add(Beat(epoch=1, epochs=3, step=step, step_in_epoch=step, samples=8.0 * step))
    assert rate.samples_per_s > 0
    assert rate.seconds_left(Beat(epoch=1, epochs=3, step=2, step_in_epoch=2)) is None
    monkeypatch.setattr("dtrain.monitoring.screen.PLAIN_LINE_EVERY_S", -1.0)
    Screen().show_beat(Beat(epoch=1, epochs=3, step=2, step_in_epoch=2, loss=0.5))
    assert capsys.readouterr().err == "epoch 1/3  step 2  loss 0.5  0 samples/s\n"
    Screen().show_beat(Beat(epoch=1, epochs=3, step=2, step_in_epoch=2))  # a loss that nobody has seen yet
    assert capsys.readouterr().err == "epoch 1/3  step 2  0 samples/s\n"


class Empty(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def trainer(**options: Any) -> Trainer:
    net, optimizer = parts(random=False)
    return Trainer(net, nn.CrossEntropyLoss(), optimizer, device="cpu", **options)


class Own(UserList):
    """A loader of one's own."""


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: trainer().evaluate(Source(Empty(), 4, True)), "Empty yields no samples in epoch 1$"),
    "empty loader": (lambda: trainer().evaluate(Own([])), "Own yields no samples in epoch 1$"),
    "empty list": (lambda: trainer().evaluate([]), "list is empty"),
    "generator": (lambda: trainer().evaluate(x for x in [1]), "a generator can be read only once"),
    "dataset": (lambda: trainer().evaluate(Numbers(Kind())), "expected a torch DataLoader, got Numbers"),
    "number": (lambda: trainer().evaluate(3), "expected a torch DataLoader, got int"),  # type: ignore[arg-type]
    "no tensor": (lambda: trainer().evaluate(Own([("a", 1)])), "a batch of type tuple holds no tensor"),
    "micro-batches": (
        lambda: trainer(micro_batch_size=2).evaluate(Own([FEATURES])),
        "micro_batch_size has no effect on batches that Own makes",
    ),
    "sampler": (
        lambda: Source(Empty(), 4, True, sampling=Sampling(range(3))),  # type: ignore[arg-type]  # no sampler, and refused
        "Empty is a stream, from which a sampler can't",
    ),
    "fewer than ranks": (
        lambda: next(stream_batches(World(2, 3, torch.device("cpu")), Numbers(Kind("evenly")), batch=2).epoch(1)),
        "Numbers splits itself among the ranks: batch_size 2 .* at least 3",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_user_gets_wrong(name):
    call, says = WRONG[name]
    with pytest.raises(UserError, match=says):
        call()
