"""DeepSpeed's ZeRO beyond what all strategies are tested for: offload, groups, frozen parameters, refusals."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from training import Job, Samples, epoch_order, fit, prepare, train

from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer.trainer import Trainer

SEED, BATCH, EPOCHS, SIZE = 3, 8, 3, 26
OFFLOADED = {"device": "cpu"}
CONFIGS: dict[str, Any] = {
    **{str(stage): {"zero_optimization": {"stage": stage}} for stage in range(4)},
    "1, in turns": {"zero_optimization": {"stage": 1, "round_robin_gradients": True}},
    "1, aligned": {"zero_optimization": {"stage": 1, "parameter_alignment": True}},
    "1, offloaded": {"zero_optimization": {"stage": 1, "offload_optimizer": OFFLOADED}},
    "2, offloaded": {"zero_optimization": {"stage": 2, "offload_optimizer": OFFLOADED, "round_robin_gradients": True}},
    "3, offloaded": {"zero_optimization": {"stage": 3, "offload_optimizer": OFFLOADED, "offload_param": OFFLOADED}},
    "3, none kept whole": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "3, in small steps": {"zero_optimization": {"stage": 3, "sub_group_size": 10, "reduce_bucket_size": 12}},
}


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x + self.shift)


def parts() -> tuple[nn.Module, Samples]:
    torch.manual_seed(SEED)
    net = nn.Sequential(nn.Linear(4, 7), Shifted(), nn.Linear(7, 7), nn.LayerNorm(7), nn.Linear(7, 1))
    net[2].requires_grad_(False)
    return net, Samples(torch.randn(SIZE, 4), torch.randn(SIZE, 1))


def made_optimizer(net: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": [*net[2].parameters(), *net[3:].parameters()]}]
    optimizer = torch.optim.SGD(groups, lr=0.03, momentum=0.9, nesterov=True)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def job(config: str, stop_after: int | None = None, micro_batch_size: int | None = None) -> Job:
    net, samples = parts()
    if dist.get_rank() > 0:  # rank 0's count
        nn.init.zeros_(net[0].weight)
        net[1].shift.zero_()
    optimizer, scheduler = made_optimizer(net)

    def stop(*_: Any) -> None:
        if net.training and next(steps) == stop_after:
            Heartbeat(RunDir(os.environ[RUN_DIR_VARIABLE]).heartbeat(0)).stop = signal.SIGTERM

    steps = iter(range(1, 100))
    net.register_forward_hook(stop)
    trainer = {"net": net, "loss_fn": nn.MSELoss(), "optimizer": optimizer, "scheduler": scheduler, "seed": SEED}
    trainer |= {"strategy": CONFIGS[config], "micro_batch_size": micro_batch_size}
    return {"trainer": trainer, "train": samples, "val": samples, "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


@pytest.fixture(scope="module")
def plain_loop() -> tuple[list[float], dict[str, torch.Tensor]]:
    net, samples = parts()
    optimizer, scheduler = made_optimizer(net)
    losses = []
    for epoch in range(1, EPOCHS + 1):
        for chosen in epoch_order(SIZE, SEED, epoch).split(BATCH):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(samples.features[chosen]), samples.target[chosen]).backward()
            optimizer.step()
        scheduler.step()
        with torch.no_grad():
            losses.append(nn.functional.mse_loss(net(samples.features), samples.target).item())
    return losses, net.state_dict()


IN_TEST = ("2", "1, in turns", "3, offloaded")  # the others are for `make faults`


@pytest.mark.parametrize(
    "config", [pytest.param(each, marks=[pytest.mark.campaign] * (each not in IN_TEST)) for each in CONFIGS]
)
def test_a_plain_loop_is_reproduced_with_a_stop_in_between(config, plain_loop, tmp_path):
    """Groups with rates of their own, a scheduler, momentum, and frozen parameters; from two ranks to three."""
    assert train(2, tmp_path, job, config, 6) == [None, None]
    rows = train(3, tmp_path, job, config, None, 2)[0][0]
    losses, weights = plain_loop
    assert [row["val_loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    found = torch.load(RunDir(tmp_path).last_weights, weights_only=True)
    assert list(found) == list(weights)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def count_sums(rank: int, world_size: int, folder: str, config: str, micro_batch_size: int) -> int:
    with CommDebugMode() as seen:
        fit(rank, world_size, folder, job, config, None, micro_batch_size)
    return seen.get_total_counts()


@pytest.mark.parametrize(("config", "is_once"), [("0", True), ("1", True), ("2", False)])
def test_gradients_are_summed_once_a_batch_where_the_stage_allows_it(config, is_once, tmp_path):
    counts = []
    for size in (BATCH, 1):
        prepare(tmp_path / str(size), 2)
        counts.append(run_ranks(2, count_sums, str(tmp_path / str(size)), config, size)[0])
    assert (counts[0] == counts[1]) == is_once


def evaluated(rank: int, world_size: int, config: dict[str, Any]) -> dict[str, Any]:
    net, samples = parts()
    if rank:
        nn.init.zeros_(net[4].weight)
    trainer = Trainer(net, nn.MSELoss(), strategy=config, device="cpu")
    return trainer.evaluate(torch.utils.data.DataLoader(samples, batch_size=BATCH))


@pytest.mark.parametrize("config", ["1", "3"])
def test_a_model_without_an_optimizer_is_evaluated(config):
    net, samples = parts()
    expected = nn.functional.mse_loss(net(samples.features), samples.target).item()
    for values in run_ranks(2, evaluated, CONFIGS[config]):
        assert values == {"val_loss": pytest.approx(expected, rel=1e-6)}


# -- refusals ----------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 1)
        self.scale = nn.Parameter(torch.ones(()))


class Unused(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 1)
        self.other = nn.Linear(4, 1)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown key": (
        lambda: (net := nn.Linear(4, 1), torch.optim.SGD(net.parameters())),
        {"zero_optimization": {"stage": 2, "overlap": True}},
        "deepspeed.zero_optimization.overlap: unknown key",
    ),
    "wrong type": (
        lambda: (net := nn.Linear(4, 1), torch.optim.SGD(net.parameters())),
        {"zero_optimization": {"stage": 2, "reduce_bucket_size": "much"}},
        "deepspeed.zero_optimization.reduce_bucket_size: Input should be a valid integer",
    ),
    "contradiction": (
        lambda: (net := nn.Linear(4, 1), torch.optim.SGD(net.parameters())),
        {"zero_optimization": {"stage": 3, "compute_grad_norm": False}},
        "deepspeed.zero_optimization: Value error, compute_grad_norm=false is supported only with ZeRO Stage 1 or 2",
    ),
    "what it asserts": (
        lambda: (net := nn.Linear(4, 1), torch.optim.SGD(net.parameters())),
        {"communication_data_type": "fp7"},
        "deepspeed: Invalid communication_data_type",
    ),
    "of the job": (
        lambda: (net := nn.Linear(4, 1), torch.optim.SGD(net.parameters())),
        {"gradient_clipping": 1.0},
        "deepspeed.gradient_clipping: is 1.0, where fit.clip_norm is null; make them agree",
    ),
    "rows and columns": (
        lambda: (net := nn.Linear(4, 1), torch.optim.Adafactor(net.parameters())),
        CONFIGS["1"],
        "Adafactor needs whole parameters",
    ),
    "LBFGS": (
        lambda: (net := nn.Linear(4, 1), torch.optim.LBFGS(net.parameters())),
        CONFIGS["0"],
        "LBFGS needs whole parameters",
    ),
    "exchanged": (
        lambda: (net := nn.Linear(4, 1), torch.optim.Adagrad(net.parameters())),
        CONFIGS["2"],
        "DeepSpeed replaces Adagrad with its own",
    ),
    "a parameter of the loss": (
        lambda: (net := nn.Linear(4, 1), torch.optim.SGD([*net.parameters(), nn.Parameter(torch.ones(1))])),
        CONFIGS["1"],
        "optimizer: 1 of its parameters belong neither to the model nor to the loss",
    ),
    "a number": (
        lambda: (net := Scaled(), torch.optim.SGD(net.parameters())),
        CONFIGS["1"],
        "scale is a scalar, which can't be sharded",
    ),
    "unused": (
        lambda: (net := Unused(), torch.optim.SGD(net.parameters())),
        CONFIGS["1"],
        "the loss does not depend on the parameters other.weight, other.bias",
    ),
}


def refused(rank: int, world_size: int, folder: str, kind: str) -> str:
    make, config, _ = REFUSED[kind]
    net, optimizer = make()
    os.environ[RUN_DIR_VARIABLE] = folder
    with pytest.raises(UserError) as error:  # noqa: PT012  # wherever it is noticed
        trainer = Trainer(net, nn.MSELoss(), optimizer, strategy=config, device="cpu")
        trainer.fit(torch.utils.data.DataLoader(parts()[1], batch_size=BATCH), epochs=1)
    return str(error.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_is_said(kind, tmp_path):
    prepare(tmp_path, 2)
    for message in run_ranks(2, refused, str(tmp_path), kind):
        assert REFUSED[kind][2] in message
