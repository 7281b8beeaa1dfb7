"""What a DataLoader says is what happens, in any of its arguments: the batches of a plain loop, on any ranks."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkContext
from typing import Any

import numpy as np
import pytest
import torch
from marks import campaign
from ranks import count_collectives, run_ranks
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)
from training import prepare

from dtrain import Ranks, Trainer, WeightedMean
from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE
from dtrain.trainer.batches import batches_of
from dtrain.trainer.data.samples import SampleReading
from dtrain.trainer.data.sharding import Indices
from dtrain.trainer.distributed.world import World, join_world

SIZE, BATCH, SEED = 23, 5, 7  # a short last batch of 3


class Numbers(Dataset):
    """Samples (index, drawn), by an index of any type, a text or a pair; by a list, a batch of them."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, list):
            return default_collate([self[each] for each in key])
        if isinstance(key, str):
            key = key.removeprefix("sample ")
        index = int(key[0] if isinstance(key, tuple) else key)
        return index, float(torch.rand(())) + np.random.rand() + random.random()


class Augmented(Subset):
    """As torch's documentation has a Subset of one's own."""

    def __getitem__(self, index: Any) -> Any:
        number, drawn = super().__getitem__(index)
        return number, drawn + random.random()

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


class Keys(Sampler):
    """Names for the samples, of any kind; no length."""

    def __init__(self, name: Callable[[int], Any]) -> None:
        self.name = name

    def __iter__(self) -> Iterator[Any]:
        return map(self.name, range(SIZE))


class Buckets(Sampler):
    """Batches of several sizes, in another order each epoch; its length is an estimate."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
        random.shuffle(batches)
        yield from batches

    def __len__(self) -> int:
        return 4


class Cycling(DataLoader):
    """A loader with an iteration of its own: all its batches twice."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(2):
            yield from super().__iter__()


class Stream(IterableDataset):
    def __init__(self, size: int = SIZE, ready: bool = False) -> None:
        self.begin, self.end, self.ready = 0, size, ready

    def __iter__(self) -> Iterator[Any]:
        for begin in range(self.begin, self.end, 4 if self.ready else 1):
            samples = [Numbers()[i] for i in range(begin, min(begin + 4, self.end))]
            yield default_collate(samples) if self.ready else samples[0]


def bulk(sampler: Sampler) -> DataLoader:
    return DataLoader(Numbers(), batch_size=None, sampler=BatchSampler(sampler, BATCH, drop_last=False))


# Those whose batches a plain loop gives, too.
PLAIN: dict[str, Callable[[], DataLoader]] = {
    "drop_last": lambda: DataLoader(Numbers(), BATCH, drop_last=True),
    "batch_sampler, a list": lambda: DataLoader(Numbers(), batch_sampler=[[0, 1, 2], [3], [4, 5, 6, 7, 8]]),
    "batch_sampler, torch's": lambda: DataLoader(
        Numbers(), batch_sampler=BatchSampler(SequentialSampler(range(13)), BATCH, drop_last=True)
    ),
    "sampler, a list": lambda: DataLoader(Numbers(), BATCH, sampler=[3, 1, 4, 1, 5, 9, 2, 6]),
    "names": lambda: DataLoader(Numbers(), BATCH, sampler=Keys(lambda i: f"sample {i}")),
    "pairs": lambda: DataLoader(Numbers(), BATCH, sampler=Keys(lambda i: (i, 32))),
    "tensors": lambda: DataLoader(Numbers(), BATCH, sampler=Keys(torch.tensor), drop_last=True),
    "numpy's": lambda: DataLoader(Numbers(), BATCH, sampler=Keys(np.int32)),
    "a part of the dataset": lambda: DataLoader(Numbers(), BATCH, sampler=SequentialSampler(range(7))),
    "bulk": lambda: bulk(SequentialSampler(Numbers())),
    "own iteration": lambda: Cycling(Numbers(), BATCH),
    "stream, drop_last": lambda: DataLoader(Stream(), BATCH, drop_last=True),
    "stream of batches": lambda: DataLoader(Stream(ready=True), batch_size=None),
    "subset": lambda: DataLoader(Subset(Subset(Numbers(), range(20)), range(2, 19)), BATCH),
    "own subset": lambda: DataLoader(Augmented(Numbers(), range(17)), BATCH),
    "concat": lambda: DataLoader(ConcatDataset([Numbers(4), Augmented(Numbers(), range(4, 11))]), BATCH),
}
# Those that draw their order, and how many samples that has.
DRAWN: dict[str, tuple[Callable[[], DataLoader], int]] = {
    "shuffle, drop_last": (lambda: DataLoader(Numbers(), BATCH, shuffle=True, drop_last=True), 20),
    "buckets": (lambda: DataLoader(Numbers(), batch_sampler=Buckets()), 17),
    "weighted": (lambda: DataLoader(Numbers(), BATCH, sampler=WeightedRandomSampler([1.0] * SIZE, 12)), 12),
    "replacement": (lambda: DataLoader(Numbers(), BATCH, sampler=RandomSampler(Numbers(), True, 9)), 9),
    "num_samples": (lambda: DataLoader(Numbers(), BATCH, sampler=RandomSampler(Numbers(), num_samples=9)), 9),
    "random subset": (lambda: DataLoader(Numbers(), BATCH, sampler=SubsetRandomSampler(range(5, 17))), 12),
    "bulk, shuffled": (lambda: bulk(RandomSampler(Numbers())), SIZE),
    "own iteration, shuffled": (lambda: Cycling(Numbers(), BATCH, shuffle=True), 2 * SIZE),
    "stack": (lambda: DataLoader(StackDataset(Numbers(), Subset(Numbers(), range(SIZE))), BATCH, shuffle=True), SIZE),
    "generator 1": (lambda: DataLoader(Numbers(), BATCH, shuffle=True, generator=seeded(1)), SIZE),
    "generator 2": (lambda: DataLoader(Numbers(), BATCH, shuffle=True, generator=seeded(2)), SIZE),
    "sampler's generator 2": (
        lambda: DataLoader(Numbers(), BATCH, sampler=RandomSampler(Numbers(), generator=seeded(2))),
        SIZE,
    ),
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Rows = list[list[Any]]  # by step, what is in a rank's part of it


def rows(batch: Any) -> list[Any]:
    """A batch's samples."""
    first, second = batch
    if isinstance(first, torch.Tensor):
        return list(zip(first.tolist(), second.tolist(), strict=True))
    return list(zip(rows(first), rows(second), strict=True))


def read(loader: Any, world: World, micro_batch_size: int | None = None, epoch: int = 1, first_step: int = 0) -> Rows:
    batches = batches_of(loader, world, SEED, micro_batch_size, fill_empty=True)
    seen: Rows = []
    for batch in batches.epoch(epoch, first_step):
        seen.append([])
        parts = list(batch.micro_batches)
        assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
        for part in parts:
            found = rows(part.data)
            assert part.is_regular
            assert part.batch_samples == batch.samples
            assert len(found) == part.samples or (not part.samples and 1 <= len(found) <= 2)
            assert part.samples <= (micro_batch_size or SIZE)
            seen[-1] += found if part.samples else []
    assert batches.num_steps in (None, first_step + len(seen)) or isinstance(loader, Cycling)
    return seen


def all_as_rank(rank: int, world_size: int, micro_batch_size: int | None) -> dict[str, tuple[Rows, Rows]]:
    world = join_world("cpu")
    makers = PLAIN | {name: make for name, (make, _) in DRAWN.items()}
    before = torch.get_rng_state()
    found = {}
    for name, make in makers.items():
        found[name] = read(make(), world, micro_batch_size), read(make(), world, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)
    if world_size > 1:
        torch.manual_seed(SEED), np.random.seed(SEED), random.seed(SEED)
        found["listed"] = (read(list(DataLoader(Numbers(), BATCH)), world, micro_batch_size), [[]])
    return found


def joined(ranks: list[Any], name: str) -> tuple[Rows, Rows]:
    """The whole batches of each epoch, put together from the ranks' parts."""
    epochs = zip(*(found[name] for found in ranks), strict=True)
    first, second = ([[row for part in parts for row in part] for parts in zip(*each, strict=True)] for each in epochs)
    return first, second


@pytest.fixture(scope="module")
def found() -> list[dict[str, tuple[Rows, Rows]]]:
    """What is read on 1, 2 and 3 ranks."""
    ranks = [run_ranks(size, all_as_rank, micro) for size, micro in ((1, 2), (2, None), (3, 1))]
    return [{name: joined(each, name) for name in each[0]} for each in ranks]


@pytest.mark.parametrize("name", PLAIN)
def test_batches_are_those_of_a_plain_loop(found, name):
    expected = [[index for index, _ in rows(batch)] for batch in PLAIN[name]()]
    for each in found:
        assert [[index for index, _ in batch] for batch in each[name][0]] == expected
        assert each[name] == found[0][name]  # in what is drawn for each sample, too
    assert found[0][name][0] != found[0][name][1]


def test_a_list_of_batches_is_cut_over_the_ranks(found):
    for each in found[1:]:
        assert [index for batch in each["listed"][0] for index, _ in batch] == list(range(SIZE))


@pytest.mark.parametrize("name", DRAWN)
def test_an_order_is_drawn_alike_on_any_ranks_and_anew_each_epoch(found, name):
    first, second = found[0][name]
    assert found[1][name] == found[2][name] == found[0][name]
    assert sum(map(len, first)) == sum(map(len, second)) == DRAWN[name][1]
    assert first != second
    world = World(0, 1, torch.device("cpu"))
    if "iteration" not in name:  # which goes on with its state alone
        assert read(DRAWN[name][0](), world, epoch=2, first_step=2) == second[2:]


def test_a_generator_counts_by_what_it_was_seeded_with(found):
    one, two, same = (found[0][name] for name in ("generator 1", "generator 2", "sampler's generator 2"))
    assert one != two
    assert same == two
    assert found[0]["buckets"][0] != found[0]["buckets"][1]


# -- loading processes ---------------------------------------------------------------------------


class Stored(Dataset):
    """Opens what it reads in each loading process, which its samples name."""

    opened: str | None = None

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        assert get_worker_info().dataset is self
        return index, os.getpid(), self.opened


def open_stored(worker: int) -> None:
    info = get_worker_info()
    assert type(info.dataset) is Stored
    info.dataset.opened = f"{info.id} of {info.num_workers} is {worker}"


class Counting(ForkContext):
    started = 0

    def Process(self, *args: Any, **kwargs: Any) -> Any:
        Counting.started += 1
        return super().Process(*args, **kwargs)


@pytest.mark.parametrize("persistent", [False, True])
def test_loading_processes_are_those_that_the_loader_asks_for(persistent):
    options = {"persistent_workers": persistent, "prefetch_factor": 1, "timeout": 100}
    Counting.started = 0
    loader = DataLoader(
        Stored(), 2, num_workers=2, worker_init_fn=open_stored, multiprocessing_context=Counting(), **options
    )
    batches = batches_of(loader, World(0, 1, torch.device("cpu")), SEED, fill_empty=True)
    seen = [[part.data for batch in batches.epoch(epoch) for part in batch.micro_batches] for epoch in (1, 2)]
    for epoch in seen:
        assert [opened for _, _, opened in epoch] == [("0 of 2 is 0",) * 2, ("1 of 2 is 1",) * 2]
    assert Counting.started == (2 if persistent else 4)
    assert (seen[0][0][1].tolist() == seen[1][0][1].tolist()) == persistent


def split(worker: int) -> None:
    """As torch's documentation has a stream divided."""
    info = get_worker_info()
    stream: Any = info.dataset
    share = -(-SIZE // info.num_workers)
    stream.begin, stream.end = worker * share, min((worker + 1) * share, SIZE)


def split_as_rank(rank: int, world_size: int) -> Any:
    loader = DataLoader(Stream(), 6, num_workers=2, worker_init_fn=split, persistent_workers=True)
    batches = batches_of(loader, join_world("cpu"), SEED, fill_empty=True)

    def read(epoch: int, first_step: int = 0) -> Any:
        for batch in batches.epoch(epoch, first_step):
            yield [index for part in batch.micro_batches if part.samples for index, _ in rows(part.data)]

    first = read(1)
    begun = [next(first) for _ in range(3)]  # an odd number: the other process is next
    state = batches.state_dict()
    epochs = [begun + list(first), list(read(2))]
    batches.load_state_dict(state)
    return epochs, begun + list(read(1, 3))


def test_a_stream_that_worker_init_fn_splits_is_read_once():
    results = run_ranks(2, split_as_rank)
    for epoch in (0, 1):
        indices = [i for epochs, _ in results for step in epochs[epoch] for i in step]
        assert sorted(indices) == list(range(SIZE))
    assert [epochs[0] for epochs, _ in results] == [epochs[1] for epochs, _ in results]
    assert [continued for _, continued in results] == [epochs[0] for epochs, _ in results]


class Slow(Numbers):
    def __getitem__(self, key: Any) -> Any:
        time.sleep(1)


class Unreadable(Exception):
    def __init__(self, path: str, code: int) -> None:
        super().__init__(f"{path} is damaged")
        self.code = code


class Failing(Dataset):
    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            if self.how == "own":
                raise Unreadable("2.png", 7)
            if self.how == "missing":
                os.stat("/no/such/file")
            if self.how == "stop":
                next(iter(()))
        return torch.zeros(3 if self.how == "ragged" and index == 2 else 2), None if self.how == "none" else 0


@pytest.mark.parametrize(
    ("how", "workers", "kind", "says"),
    [
        ("own", 0, Unreadable, "2.png is damaged"),
        ("own", 1, Unreadable, "2.png is damaged"),
        campaign("missing", 1, FileNotFoundError, "[Errno 2] No such file or directory: '/no/such/file'"),
        ("stop", 0, RuntimeError, "sample 2 of Failing raised StopIteration"),
        campaign("stop", 1, RuntimeError, "sample 2 of Failing raised StopIteration"),
        (
            "ragged",
            0,
            UserError,
            "samples 0, 1, 2, 3 cannot be collated into one batch: sample 0 is (float32 [2], int)",
        ),
        ("none", 0, UserError, "each is (float32 [2], None)"),
    ],
)
def test_a_failure_arrives_as_itself_and_names_the_sample(how, workers, kind, says):
    with pytest.raises(kind) as raised:
        read(DataLoader(Failing(how), 4, num_workers=workers), World(0, 1, torch.device("cpu")))
    assert type(raised.value) is kind
    assert says in str(raised.value)
    if how == "own":
        assert raised.value.code == 7
    if how in ("own", "missing"):
        assert raised.value.__notes__ == ["sample 2 of Failing"] + ["in loading process 0"] * workers
    if workers:  # the user's lines
        assert "in a loading process" in str(raised.value.__cause__)
        assert kind is UserError or "in __getitem__" in str(raised.value.__cause__)


def test_a_timeout_is_kept():
    loader = DataLoader(Slow(), 4, num_workers=1, timeout=0.2)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.2 seconds"):
        read(loader, World(0, 1, torch.device("cpu")))


# -- collate functions ---------------------------------------------------------------------------

torch.manual_seed(SEED)
FEATURES = torch.randn(SIZE, 4)
TARGET = FEATURES.sum(1, keepdim=True).tanh()


class Corrupt(Dataset):
    """Some samples can't be read, and are None."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return None if index % 5 in (1, 2) else (FEATURES[index], TARGET[index])


def whole(samples: list[Any]) -> Any:
    kept = [sample for sample in samples if sample is not None]
    return default_collate(kept) if kept else None


def dropping_loop(rank: int, world_size: int) -> tuple[torch.Tensor, list[int]]:
    ranks = Ranks(device="cpu")
    torch.manual_seed(SEED)
    net = ranks.wrap(nn.Linear(4, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    counts = []
    for features, target in ranks.shard(DataLoader(Corrupt(), BATCH, collate_fn=whole)):
        optimizer.zero_grad()
        ranks.scale_loss(nn.functional.mse_loss(net(features), target)).backward()
        optimizer.step()
        counts.append(len(features) if ranks.has_samples else 0)
    return getattr(net, "module", net).weight.detach().clone(), counts


def test_samples_that_a_collate_function_leaves_out_do_not_count():
    torch.manual_seed(SEED)
    net = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    counts = []
    for features, target in DataLoader(Corrupt(), BATCH, collate_fn=whole):
        optimizer.zero_grad()
        nn.functional.mse_loss(net(features), target).backward()
        optimizer.step()
        counts.append(len(features))
    for world_size in (1, 3):  # on 3, some shares are left out whole
        results = run_ranks(world_size, dropping_loop)
        assert [sum(of_step) for of_step in zip(*(each for _, each in results), strict=True)] == counts
        for weight, _ in results:
            torch.testing.assert_close(weight, net.weight.detach(), rtol=1e-5, atol=1e-6)


class Rooms(nn.Module):
    """Two layers: a sample goes to that which its last feature names, so that a batch may leave out one."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = x.new_zeros(len(x), 1)
        for room, chosen in zip(self.rooms, (x[:, 3] > 0, x[:, 3] <= 0), strict=True):
            if chosen.any():
                found = found.index_put((chosen,), room(x[chosen]))
        return found


class Sparse(Dataset):
    """Of a batch of 6 one sample is left, of the third none. The first ones go to one room, then some to the other."""

    def __len__(self) -> int:
        return 36

    def __getitem__(self, index: int) -> Any:
        if index % 6 not in (1, 5) or index // 6 == 2 or (index % 6 == 5 and index // 6 != 4):
            return None
        features = FEATURES[index % SIZE].clone()
        features[3] = features[3].abs() * (-1 if index // 6 in (0, 4) else 1)
        return features, TARGET[index % SIZE]


class SparseStream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return map(Sparse().__getitem__, range(36))


def halved(predictions: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (predictions - target).square().mean() / 2


class Halved(WeightedMean):
    def units(self, predictions: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (predictions - target).square() / 2, torch.ones_like(target)


def sparse_parts(optimizer: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(SEED)
    net = Rooms()
    if optimizer == "LBFGS":
        return net, torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=2)
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def sparse_fit(
    rank: int, world_size: int, folder: str, optimizer: str, dataset: Any, micro_batch_size: int | None, workers: int
) -> tuple[dict[str, torch.Tensor], float]:
    net, made = sparse_parts(optimizer)
    os.environ[RUN_DIR_VARIABLE] = folder
    options = {"micro_batch_size": micro_batch_size, "unused_parameters": "allow", "device": "cpu"}
    trainer = Trainer(net, Halved(), made, **options)
    rows = trainer.fit(DataLoader(dataset, 6, collate_fn=whole, num_workers=workers), epochs=2)
    return trainer.model.state_dict(), rows.train_loss.iloc[-1]


@pytest.mark.parametrize(
    ("optimizer", "dataset", "micro_batch_size", "workers"),
    [("SGD", Sparse, None, 0), ("SGD", Sparse, 1, 1), ("SGD", SparseStream, 2, 1), ("LBFGS", Sparse, None, 0)],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_left_out_whole_changes_nothing(tmp_path, optimizer, dataset, micro_batch_size, workers):
    """A rank's share, or a whole batch: no parameter that no sample of the batch uses is moved, by momentum say."""
    net, made = sparse_parts(optimizer)
    losses = []
    for epoch in range(2):
        for batch in DataLoader(dataset(), 6, collate_fn=whole):
            if batch is None:
                continue
            features, target = batch

            def closure(features: Any = features, target: Any = target) -> torch.Tensor:
                made.zero_grad()
                loss = halved(net(features), target)
                loss.backward()
                return loss

            losses += [(epoch, len(target), closure().item())]
            made.step(closure)
    counted = [(count, loss) for epoch, count, loss in losses if epoch]
    mean = sum(count * loss for count, loss in counted) / sum(count for count, _ in counted)
    for world_size in (1, 3):
        prepare(run := tmp_path / f"of {world_size}", world_size)
        fitted = run_ranks(world_size, sparse_fit, str(run), optimizer, dataset(), micro_batch_size, workers)
        for weights, loss in fitted:
            assert loss == pytest.approx(mean, rel=1e-5)
            for name, value in net.state_dict().items():
                torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


class Uneven:
    """A loader of the user's own: the second rank has one batch, whose features are of two lengths."""

    def __init__(self, rank: int) -> None:
        chosen = [slice(6, 9)] if rank else [slice(0, 4), slice(4, 5), slice(5, 6)]
        rows = [(ROOM_FEATURES[each], TARGET[each]) for each in chosen]
        self.batches = [((x, torch.zeros(len(x) + rank)), y) for x, y in rows]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


# The second rank's samples go to one room, those of the first rank's later batches to the other.
ROOM_FEATURES = FEATURES[:9].clone()
ROOM_FEATURES[:, 3] = ROOM_FEATURES[:, 3].abs() * torch.tensor([1, 1, 1, 1, -1, -1, 1, 1, 1])


class FirstOfTwo(Rooms):
    def forward(self, x: Any) -> torch.Tensor:
        return super().forward(x[0])


def uneven_parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(SEED)
    net = FirstOfTwo()
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def uneven_fit(rank: int, world_size: int, folder: str) -> dict[str, torch.Tensor]:
    os.environ[RUN_DIR_VARIABLE] = folder
    net, optimizer = uneven_parts()
    trainer = Trainer(net, nn.MSELoss(), optimizer, unused_parameters="allow", device="cpu")
    trainer.fit(Uneven(rank), epochs=1)
    return trainer.model.state_dict()


@pytest.mark.filterwarnings("ignore")
def test_a_loader_that_ends_early_on_one_rank_fills_from_the_others_batch(tmp_path):
    """Nor do ranks part ways whose batches count by rows on one of them, and not on the other."""
    net, optimizer = uneven_parts()
    for chosen in ([0, 1, 2, 3, 6, 7, 8], [4], [5]):
        optimizer.zero_grad()
        nn.functional.mse_loss(net((ROOM_FEATURES[chosen], None)), TARGET[chosen]).backward()
        optimizer.step()
    prepare(tmp_path / "run", 2)
    for weights in run_ranks(2, uneven_fit, str(tmp_path / "run")):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-6)


def count_of_a_list(rank: int, world_size: int) -> dict[str, int]:
    batches = batches_of([(FEATURES[:4], TARGET[:4])] * 3, join_world("cpu"), SEED, fill_empty=True)
    with count_collectives() as seen:
        assert sum(part.samples for batch in batches.epoch(1) for part in batch.micro_batches) == 6
    return dict(seen)


def test_ranks_need_not_agree_on_a_list_that_all_of_them_have():
    assert run_ranks(2, count_of_a_list) == [{}, {}]


def test_a_collate_function_that_fails_where_it_leaves_out_all():
    def careless(samples: list[Any]) -> Any:
        return default_collate([sample for sample in samples if sample is not None])

    def broken(samples: list[Any]) -> Any:
        return samples[0].nothing

    indices = Indices([1, 2])
    indices.seeds = [0, 0]
    with pytest.raises(IndexError) as raised:
        SampleReading(Corrupt(), careless).answer(indices)
    assert "drops all samples of a rank's share, let it return None" in raised.value.__notes__[0]
    with pytest.raises(AttributeError) as raised:
        SampleReading(Corrupt(), broken).answer(indices)
    assert raised.value.__notes__ == ["collate of samples 1, 2 of Corrupt"]


# -- what can't be read --------------------------------------------------------------------------


def ragged_batches() -> DataLoader:
    batches = [(torch.zeros(3, 2), torch.zeros(5)), (torch.zeros(2, 2), torch.zeros(4))]
    return DataLoader(batches, batch_size=None)


class Endless(Sampler):
    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield [0]

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (ragged_batches, "a batch of list can't be cut: all its parts must be tensors, arrays, or lists"),
        (lambda: DataLoader(Numbers(2), BATCH, drop_last=True), "drop_last leaves no batch of Numbers: 2 samples"),
        (lambda: DataLoader(Numbers(), batch_sampler=[[0], []]), "list drew an empty batch for epoch 1"),
        (lambda: DataLoader(Numbers(), batch_sampler=Endless()), "Endless draws more than 6 batches, its length is 3"),
        (lambda: DataLoader(Numbers(), timeout=3), "the DataLoader's timeout is for loading processes"),
        (
            lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(DistributedSampler(Numbers(), 2, 0), 2, False)),
            "DistributedSampler gives each rank its part",
        ),
    ],
)
def test_what_can_not_be_read_is_refused_in_words(make, says):
    world = World(0, 2, torch.device("cpu"))  # no message passes: there is no group
    with pytest.raises(UserError) as raised:
        read(make(), world)
    assert str(raised.value).startswith(says)


def test_batches_that_can_not_be_cut_are_read_in_one_process():
    batches = batches_of(ragged_batches(), World(0, 1, torch.device("cpu")), SEED, fill_empty=True)
    parts = [part for batch in batches.epoch(1) for part in batch.micro_batches]
    assert [(part.samples, part.is_whole, part.is_regular) for part in parts] == [(3, True, False), (2, True, False)]


def test_predict_refuses_what_gives_no_row_for_each_sample():
    trainer = Trainer(nn.Linear(1, 1), nn.MSELoss(), device="cpu")
    for options in ({"drop_last": True}, {"batch_size": None}, {"sampler": [1, 2]}, {"batch_sampler": [[1], [2]]}):
        with pytest.raises(UserError, match="predict returns a row for each sample of Numbers"):
            trainer.predict(DataLoader(Numbers(), **options))


# -- a set that no list of indices could hold ----------------------------------------------------


class Huge(Dataset):
    def __len__(self) -> int:
        return 10**12

    def __getitem__(self, index: int) -> Any:
        return torch.full((2,), index / 1e12), torch.tensor([index / 1e12])


class EnoughSeen(Exception):
    pass


def huge_steps(rank: int, world_size: int, folder: str) -> list[float]:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen: list[float] = []

    def step(model: nn.Module, batch: Any) -> Any:
        features, target = batch
        seen.extend(target.flatten().tolist())
        if len(seen) == 12:
            raise EnoughSeen
        return {"loss": nn.functional.mse_loss(model(features), target), "weight": len(target)}

    trainer = Trainer(net, step=step, optimizer=optimizer, run_dir=folder, device="cpu")
    with pytest.raises(EnoughSeen):
        trainer.fit(DataLoader(Huge(), 8, shuffle=True), epochs=1)
    return seen


def test_a_set_of_a_million_million_samples_is_shuffled_at_once(tmp_path):
    seen = [number for each in run_ranks(2, huge_steps, str(tmp_path / "run")) for number in each]
    assert len(set(seen)) == 24
    assert 0.2 < np.mean(seen) < 0.8
