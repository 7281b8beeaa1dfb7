"""Strategies that leave each rank a part of the model: the numbers of a plain loop, and checkpoints for each other."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import campaign
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from training import Job, Samples, content, differences, epoch_order, fit, prepare, train

from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.schema.sections import Fit, Fsdp
from dtrain.trainer.checkpoint.manager import saved
from dtrain.trainer.distributed.world import join_world
from dtrain.trainer.model.blocks import of_classes, repeated
from dtrain.trainer.model.meta import build_on_meta
from dtrain.trainer.optimization.optimizer_step import Update
from dtrain.trainer.optimization.precision import Precision
from dtrain.trainer.strategies.fsdp import FullySharded
from dtrain.trainer.trainer import Trainer

SEED, BATCH, EPOCHS, CLASSES = 4, 9, 5, 3
NUM_TRAIN, NUM_VAL = 82, 19  # 10 steps an epoch; last batches of 1, which leave ranks without a sample
STRATEGIES: dict[str, Any] = {
    "ddp": "ddp",
    "fsdp": Fsdp(),
    "fsdp, kept": Fsdp(wrap=["Block"], reshard_after_forward=False),
    **{f"ZeRO {stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)},
}


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 10), nn.Linear(10, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Parameters of one row and of more, no multiple of 2 or 3 among them, tied ones, and buffers of both kinds."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.first, self.tied = nn.Linear(5, width), nn.Linear(5, width)
        self.tied.bias = self.first.bias
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, CLASSES)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("shift", torch.randn(width))
        self.register_buffer("hidden", torch.randn(width), persistent=False)
        with torch.no_grad():  # an initialisation after those of the layers, as many models have
            for block in self.blocks:
                block.down.weight.normal_(0.0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) * self.tied(x) + self.shift + self.hidden
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale


def parts() -> tuple[nn.Module, torch.optim.Optimizer, nn.Module, Samples, Samples]:
    torch.manual_seed(SEED)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))  # its weight is known only after the batch
    train_set, val_set = (Samples(torch.randn(n, 5), torch.randint(CLASSES, (n,))) for n in (NUM_TRAIN, NUM_VAL))
    return net, optimizer, loss_fn, train_set, val_set


def job(strategy: str, epochs: int, micro_batch_size: int | None = None) -> Job:
    net, optimizer, loss_fn, train_set, val_set = parts()
    trainer = {"net": net, "loss_fn": loss_fn, "optimizer": optimizer, "seed": SEED}
    trainer |= {"strategy": STRATEGIES[strategy], "micro_batch_size": micro_batch_size, "clip_norm": 1.0}
    return {"trainer": trainer, "train": train_set, "val": val_set, "batch_size": BATCH, "fit": {"epochs": epochs}}


@pytest.fixture(scope="module")
def plain_loop() -> list[tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """50 steps as everybody would write them, in one process: each epoch's row, and the weights after it."""
    net, optimizer, loss_fn, train_set, val_set = parts()
    epochs, clipped = [], 0
    for epoch in range(1, EPOCHS + 1):
        loss_sum = weight_sum = 0.0
        for chosen in epoch_order(NUM_TRAIN, SEED, epoch).split(BATCH):
            target = train_set.target[chosen]
            loss = loss_fn(net(train_set.features[chosen]), target)
            optimizer.zero_grad()
            loss.backward()
            clipped += bool(nn.utils.clip_grad_norm_(net.parameters(), 1.0) > 1.0)
            optimizer.step()
            weight = float(loss_fn.weight[target].sum())
            loss_sum, weight_sum = loss_sum + loss.item() * weight, weight_sum + weight
        with torch.no_grad():
            val_loss = loss_fn(net(val_set.features), val_set.target).item()
        row = {"train_loss": loss_sum / weight_sum, "val_loss": val_loss}
        epochs.append((row, {name: value.clone() for name, value in net.state_dict().items()}))
    assert 0 < clipped < 50
    return epochs


def assert_like(plain_loop: Any, folder: Any, rows: list[dict[str, Any]], epochs: int) -> None:
    assert len(rows) == epochs
    expected_weights = plain_loop[epochs - 1][1]
    for row, (expected, _) in zip(rows, plain_loop[:epochs], strict=True):
        for name, value in expected.items():
            assert row[name] == pytest.approx(value, rel=1e-5), (row["epoch"], name)
    weights = torch.load(RunDir(folder).last_weights, weights_only=True)
    assert list(weights) == list(expected_weights)
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "world_size"),
    [
        *itertools.product(("ddp", "fsdp", "ZeRO 3"), (2, 3)),
        *(("fsdp, kept", 3), ("ZeRO 1", 2), ("ZeRO 2", 3)),
        *(campaign(*each) for each in (("ZeRO 1", 3), ("ZeRO 2", 2), ("ZeRO 0", 3))),
        *(campaign(each, 1) for each in ("ddp", "fsdp", "ZeRO 3")),
    ],
)
def test_the_curve_is_that_of_a_plain_loop(strategy, world_size, plain_loop, tmp_path):
    results = train(world_size, tmp_path, job, strategy, EPOCHS, 2 if world_size == 3 else None)
    for rows, _ in results:
        assert_like(plain_loop, tmp_path, rows, EPOCHS)


WRITERS = list(itertools.product(("ddp", "fsdp", "ZeRO 1", "ZeRO 2", "ZeRO 3"), (1, 2, 3)))
# Each checkpoint is continued by three others, each strategy at each size continues three; `make faults` has all.
PAIRS = [
    pytest.param(writer, WRITERS[(i + distance) % len(WRITERS)], marks=[pytest.mark.campaign] * (distance > 4 or i % 2))
    for i, writer in enumerate(WRITERS)
    for distance in (4, 8, 12)
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of two epochs; each is made once."""
    folders = {}

    def get(strategy: str, world_size: int) -> Any:
        if (strategy, world_size) not in folders:
            folders[strategy, world_size] = folder = tmp_path_factory.mktemp("begun")
            train(world_size, folder, job, strategy, 2)
        return folders[strategy, world_size]

    return get


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_checkpoint_is_continued_by_another_strategy_or_number_of_ranks(before, after, begun, plain_loop, tmp_path):
    folder = Path(shutil.copytree(begun(*before), tmp_path / "run"))
    results = train(after[1], folder, job, after[0], 3)
    assert_like(plain_loop, folder, results[0][0], 3)


def test_checkpoints_of_all_strategies_hold_the_same(begun):
    """Whole tensors by name, whoever has saved them."""
    one, *others = (content(saved(RunDir(begun(strategy, 3)))[-1])["shared"] for strategy, size in WRITERS if size == 3)
    for other in others:
        assert list(one["model"]) == list(other["model"])
        assert [*one["optimizer"]["state"]] == [*other["optimizer"]["state"]]
        for name, state in one["optimizer"]["state"].items():
            assert list(state) == list(other["optimizer"]["state"][name])
            for key, value in state.items():
                torch.testing.assert_close(other["optimizer"]["state"][name][key], value, rtol=1e-3, atol=1e-5)


# -- what a rank has --------------------------------------------------------------------------------


def shards(rank: int, world_size: int, on_meta: bool) -> dict[str, Any]:
    """Rank 0's model, cut. On the others another one, or none."""

    def build() -> nn.Module:
        torch.manual_seed(SEED + rank)
        return Net()

    net = build_on_meta(build) if on_meta and rank else build()
    assert net is not None
    whole = {name: value.clone() for name, value in net.state_dict().items()} if not rank else {}
    optimizer = torch.optim.Adagrad(net.parameters(), initial_accumulator_value=0.5)  # has a state from its start
    model = FullySharded(net, join_world("cpu"), Fsdp(), None)
    model.adopt(optimizer)
    gathered = dict(model.weights())
    own = {name: p.to_local().numel() for name, p in net.named_parameters() if isinstance(p, DTensor)}
    assert net.tied.bias is net.first.bias
    states = [optimizer.state[p]["sum"] for p in net.parameters()]
    assert all(isinstance(state, DTensor) and (state.to_local() == 0.5).all() for state in states)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, net.parameters()))
    model.module(lambda net: net(torch.randn(4, 5)).sum()).backward()
    optimizer.step()  # on what it has adopted
    changed = float(net.head.weight.full_tensor().sum())
    return {"own": own, "whole": whole, "gathered": gathered, "hidden": net.hidden, "changed": changed}


@pytest.mark.parametrize("on_meta", [False, True])
def test_each_rank_keeps_a_part_of_rank_0s_model(on_meta):
    found = run_ranks(3, shards, on_meta)
    assert differences(found[0]["whole"], found[0]["gathered"]) == []
    expected = {name: p.numel() for name, p in Net().named_parameters()}
    assert {name: sum(each["own"][name] for each in found) for name in expected} == expected
    largest = max(sum(each["own"].values()) for each in found)
    assert largest < 0.5 * sum(expected.values())
    assert all(torch.equal(each["hidden"], found[0]["hidden"]) for each in found)
    assert len({each["changed"] for each in found} | {float(found[0]["whole"]["head.weight"].sum())}) == 2


def gathered(rank: int, world_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    torch.manual_seed(SEED + rank)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    return before, dict(FullySharded(net, join_world("cpu"), Fsdp(), None).weights())


def test_weights_come_whole_and_as_they_were():
    (before, whole), (_, elsewhere) = run_ranks(2, gathered)
    assert differences(before, whole) == []
    assert elsewhere == {}


def sums_over_ranks(rank: int, world_size: int, folder: str, micro_batch_size: int) -> int:
    with CommDebugMode() as seen:
        fit(rank, world_size, folder, job, "fsdp", 1, micro_batch_size)
    return sum(count for name, count in seen.get_comm_counts().items() if "reduce_scatter" in str(name))


def test_gradients_are_summed_once_a_batch_in_however_many_parts(tmp_path):
    counts = []
    for size in (BATCH, 1):
        prepare(tmp_path / str(size), 2)
        counts += run_ranks(2, sums_over_ranks, str(tmp_path / str(size)), size)
    assert counts == [10 * 4] * 4  # steps, and the blocks with the model's own parameters


class WithNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rates = [nn.Dropout(float(rate)) for rate in torch.linspace(0, 0.5, 3)]
        self.layer = nn.Linear(2, 2)


class WithTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.anchors = {"small": [torch.ones(2)]}
        self.layer = nn.Linear(2, 2)


def test_what_can_be_built_without_values():
    assert build_on_meta(WithNumbers) is None
    assert build_on_meta(WithTensor) is None
    assert {p.device.type for p in build_on_meta(Net).parameters()} == {"meta"}


def overflow(rank: int, world_size: int) -> list[Any]:
    """fp16's scaler, with an overflow in one rank's part alone. torch's scaler does so on a CPU too."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    model = FullySharded(net, join_world("cpu"), Fsdp(), None)
    model.adopt(optimizer)
    precision = Precision("fp32", torch.device("cpu"))
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    update = Update(model, optimizer, precision, Fit(epochs=1))
    precision.scaled(model.module(lambda net: net(torch.ones(1, 3)).sum())).backward()
    before = model.weights()
    if rank == 1:
        net.weight.grad.to_local()[0] = torch.inf
    update.apply(1)
    skipped = rank or torch.equal(before["weight"], model.weights()["weight"])
    if rank:
        model.weights()
    return [bool(skipped), precision.scaler.get_scale()]


def test_an_overflow_in_one_ranks_part_is_seen_by_all():
    assert run_ranks(2, overflow) == [[True, 512.0], [True, 512.0]]


# -- blocks and refusals -----------------------------------------------------------------------------


def classes(blocks: list[nn.Module]) -> list[str]:
    return [type(block).__name__ for block in blocks]


def test_blocks_that_are_named():
    named = of_classes(Net(), ["Block", "Linear"], "fsdp.wrap")
    assert classes(named) == ["Linear", "Linear", *["Block", "Linear", "Linear"] * 3, "Linear"]


def test_blocks_that_are_found():
    net = Net()
    assert repeated(net) == list(net.blocks)
    assert repeated(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False)
    assert repeated(nn.Sequential(encoder, nn.Linear(8, 2))) == list(encoder.layers)
    stages = nn.ModuleDict({name: nn.Sequential(Block(4), Block(4)) for name in "ab"})
    assert classes(repeated(stages)) == ["Sequential", "Sequential"]


def tied_over_blocks() -> nn.Module:
    net = Net()
    net.blocks[0].up.weight = net.blocks[1].up.weight
    return net


def with_scalar() -> nn.Module:
    net = Net()
    net.scale = nn.Parameter(torch.tensor(1.0))
    return net


REFUSED = {
    "no such class": (
        Net,
        Fsdp(wrap=["Blok"]),
        "no module of class Blok; did you mean Block?",
    ),
    "a list": (Net, Fsdp(wrap=["ModuleList"]), "ModuleList is only a list of modules"),
    "tied": (tied_over_blocks, Fsdp(), "blocks.0.up.weight and blocks.1.up.weight are one parameter"),
    "a number": (with_scalar, Fsdp(), "scale is a scalar, which can't be sharded: give it the shape (1,)"),
    "channels last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        Fsdp(),
        "weight can't be sharded: it is not contiguous",
    ),
    "sparse": (lambda: nn.Embedding(4, 2, sparse=True), Fsdp(), "sparse gradients can't be summed"),
    "offload": (Net, Fsdp(offload=True), "there is no GPU here"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_can_not_be_cut(kind, tmp_path):
    make, settings, says = REFUSED[kind]
    with pytest.raises(UserError) as error:
        Trainer(make(), nn.MSELoss(), strategy=settings, device="cpu", run_dir=tmp_path / "run")
    assert says in str(error.value)


def refused(rank: int, world_size: int, name: str) -> str:
    net = Net()
    with pytest.raises(UserError) as error:
        Trainer(net, nn.MSELoss(), getattr(torch.optim, name)(net.parameters()), strategy=Fsdp(), device="cpu")
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "says"), [("LBFGS", "LBFGS needs all parameters as one vector"), ("Adafactor", "Adafactor can't work")]
)
def test_optimizers_that_need_whole_parameters(name, says):
    assert says in run_ranks(1, refused, name)[0]


# -- the command -------------------------------------------------------------------------------------


SCORES = """
def brier(predictions, target):
    return ((predictions[:, 1] - target) ** 2).mean()
"""


def test_a_job_goes_from_strategy_to_strategy(project):
    """With a loss that weighs classes, and a function as metric."""
    loss = {"_target_": "dtrain.MulticlassFocalLoss", "weight": [1.0, 3.0]}
    project.job(fit={"epochs": 4}, loss=loss, metrics={"brier": {"_target_": "scores.brier", "activation": "softmax"}})
    (project.folder / "scores.py").write_text(SCORES)
    (project.folder / "zero.json").write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}')
    project.run("launch", "--gpus", "1", "--run-dir", "whole", "job.yaml")
    begun = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml", "fit.strategy=fsdp", "fit.epochs=1")
    assert begun.code == 0, begun.err
    for gpus, *settings in (("2", "fit.strategy=deepspeed", "deepspeed=zero.json", "fit.epochs=3"), ("3",)):
        done = project.run("launch", "--gpus", gpus, "--run-dir", "run", "--resume", "job.yaml", *settings)
        assert done.code == 0, done.err
    rows, expected = (RunDir(project.folder / name).rows() for name in ("run", "whole"))
    for row, other in zip(rows, expected, strict=True):
        for name in ("train_loss", "val_loss", "val_brier"):
            assert row[name] == pytest.approx(other[name], rel=1e-5)


@pytest.mark.parametrize(
    ("strategy", "setting", "code", "says"),
    [  # those with code 1 are said by the ranks, before training
        ("fsdp", "fsdp.wrap=Bloc", 1, "fsdp.wrap: the model has no module of class Bloc"),
        ("fsdp", "fsdp.offload=true", 2, "fsdp.offload: moves GPU state to CPU memory"),
        ("deepspeed", "deepspeed.zero_optimization.stag=2", 1, "deepspeed.zero_optimization.stag: unknown key"),
        ("deepspeed", "deepspeed.train_batch_size=5", 2, "deepspeed.train_batch_size: is 5, where data.batch_size is"),
    ],
)
def test_wrong_settings(strategy, setting, code, says, project):
    done = project.run("launch", "--gpus", "2", "job.yaml", f"fit.strategy={strategy}", setting)
    assert done.code == code
    assert says in done.err
    assert "Traceback" not in done.err
