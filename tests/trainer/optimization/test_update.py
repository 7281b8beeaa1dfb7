"""Clipping, batches left out, 16 bits and parameter groups: what a plain loop does, on any number of ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from marks import campaign
from ranks import run_ranks
from torch import nn
from torch.optim import LBFGS
from training import Job, Samples, epoch_order, final_state, fit, prepare, train

from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.schema.loading import load_job
from dtrain.schema.sections import Fit, Fsdp
from dtrain.schema.targets import Group
from dtrain.trainer.distributed.world import World
from dtrain.trainer.entrypoints.train import build_model, build_optimizer, build_schedulers
from dtrain.trainer.optimization.optimizer_step import Update
from dtrain.trainer.optimization.param_groups import grouped, named_parameters
from dtrain.trainer.optimization.precision import Precision
from dtrain.trainer.strategies.base import Parallel
from dtrain.trainer.trainer import Trainer

CPU = torch.device("cpu")
STRATEGIES: dict[str, Any] = {"ddp": "ddp", "fsdp": Fsdp(wrap=["Linear"])} | {
    f"ZeRO {stage}": {"zero_optimization": {"stage": stage}} for stage in range(4)
}
SIZE, BATCH, EPOCHS = 26, 8, 2
BAD = 5  # a sample whose target is not finite
OPTIONS = {
    "norm": {"clip_norm": 0.1},
    "value": {"clip_value": 0.02},
    "skip": {"on_nonfinite": "skip"},
    "bf16": {"precision": "bf16"},
}


def parts(bad: bool) -> tuple[nn.Module, torch.optim.Optimizer, Samples]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    samples = Samples(torch.randn(SIZE, 4), torch.randn(SIZE, 1))
    if bad:
        samples.target[BAD] = math.inf
    return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), samples


def job(option: str, micro_batch_size: int | None = None, strategy: Any = "ddp") -> Job:
    net, optimizer, samples = parts(option == "skip")
    trainer = {"net": net, "loss_fn": nn.MSELoss(), "optimizer": optimizer, "micro_batch_size": micro_batch_size}
    trainer["strategy"] = strategy
    return {
        "trainer": {**trainer, **OPTIONS[option]},
        "train": samples,
        "batch_size": BATCH,
        "fit": {"epochs": EPOCHS},
    }


def plain_loop(option: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    net, optimizer, samples = parts(option == "skip")
    losses = []
    for epoch in range(1, EPOCHS + 1):
        total, count = 0.0, 0
        for chosen in epoch_order(SIZE, 0, epoch).split(BATCH):
            with torch.autocast("cpu", torch.bfloat16, enabled=option == "bf16"):
                loss = nn.functional.mse_loss(net(samples.features[chosen]), samples.target[chosen])
            optimizer.zero_grad()
            loss.backward()
            if option == "skip" and not math.isfinite(loss):
                continue
            if option == "norm":
                assert nn.utils.clip_grad_norm_(net.parameters(), 0.1) > 0.1
            if option == "value":
                nn.utils.clip_grad_value_(net.parameters(), 0.02)
            optimizer.step()
            total, count = total + loss.item() * len(chosen), count + len(chosen)
        losses.append(total / count)
    return losses, net.state_dict()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize(
    ("strategy", "world_size", "micro_batch_size"),
    [
        *(("ddp", 1, None), ("ddp", 3, 2), ("fsdp", 2, None), ("ZeRO 3", 2, 2)),
        *(campaign("ddp", 2, None), campaign("fsdp", 1, None), campaign("fsdp", 3, 2)),
        *(campaign(f"ZeRO {stage}", 2, 2) for stage in range(3)),
    ],
)
def test_a_plain_loop_is_reproduced(option, strategy, world_size, micro_batch_size, tmp_path):
    losses, weights = plain_loop(option)
    results = train(world_size, tmp_path, job, option, micro_batch_size, STRATEGIES[strategy])
    # bf16 has 8 bits, and rounds each part's gradient for itself: a plain loop over halves of batches differs by 0.009.
    tolerance, least = (2e-2, 1e-2) if option == "bf16" else (1e-5, 1e-6)
    for rows, found in results:
        assert [row["train_loss"] for row in rows] == pytest.approx(losses, rel=tolerance)
        for name, expected in weights.items():
            torch.testing.assert_close(found[name], expected, rtol=tolerance, atol=least)
    assert all(torch.equal(results[0][1][name], found[name]) for _, found in results for name in weights)


def test_each_option_matters():
    plain = plain_loop("value")[1]
    others = [plain_loop(option)[1] for option in ("norm", "bf16")]
    assert not any(torch.allclose(plain["0.weight"], other["0.weight"], rtol=1e-3) for other in others)


def test_bf16_computes_in_16_bits_and_keeps_the_weights_in_32(tmp_path):
    seen = []
    net, optimizer, samples = parts(False)
    net[2].register_forward_hook(lambda module, inputs, output: seen.append((output.dtype, module.training)))
    trainer = Trainer(net, nn.MSELoss(), optimizer, precision="bf16", run_dir=tmp_path / "run", device="cpu")
    loader = torch.utils.data.DataLoader(samples, batch_size=BATCH)
    trainer.fit(loader, loader, epochs=1)
    assert set(seen) == {(torch.bfloat16, True), (torch.bfloat16, False)}
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def stop(rank: int, world_size: int, folder: str) -> tuple[str, torch.Tensor]:
    made = job("skip")
    made["trainer"]["on_nonfinite"] = "stop"
    with pytest.raises(UserError) as error:
        fit(rank, world_size, folder, lambda: made)
    return str(error.value), made["trainer"]["net"][0].weight.detach().clone()


@pytest.mark.parametrize("world_size", [1, 3])
def test_all_ranks_stop_before_what_is_not_finite_reaches_the_weights(world_size, tmp_path):
    prepare(tmp_path, world_size)
    found = run_ranks(world_size, stop, str(tmp_path))
    for message, weights in found:
        assert "are not finite, their norm is " in message
        assert "fit.on_nonfinite: skip" in message
        assert torch.isfinite(weights).all()


def test_fp16_scales_the_loss_and_leaves_out_what_overflows():
    """torch's scaler does so on a CPU too, though fit.precision refuses that."""
    precision = Precision("fp32", CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    net = nn.Linear(2, 1, bias=False)
    weight = net.weight
    nn.init.ones_(weight)
    fit = Fit(epochs=1, clip_norm=0.5)
    update = Update(Parallel(net, World(0, 1, CPU)), torch.optim.SGD([weight], lr=1.0), precision, fit)
    precision.scaled((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    assert weight.grad[0].tolist() == [3072.0, 4096.0]
    assert update.apply(1)
    assert weight[0].tolist() == pytest.approx([0.7, 0.6])  # the gradient (3, 4), scaled down to the norm 0.5
    assert precision.scaler.get_scale() == 2048.0

    before = precision.state_dict()
    weight.grad = torch.tensor([[math.inf, 0.0]])
    update.apply(2)
    assert weight[0].tolist() == pytest.approx([0.7, 0.6])
    assert precision.scaler.get_scale() == 1024.0
    precision.load_state_dict(before)
    assert precision.scaler.get_scale() == 2048.0


def test_what_can_not_go_together():
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        Precision("fp16", CPU)
    net = nn.Linear(2, 1)
    model = Parallel(net, World(0, 1, CPU))
    with pytest.raises(UserError, match=r"LBFGS computes the gradient .* fit.clip_norm can't"):
        Update(model, LBFGS(net.parameters()), Precision("fp32", CPU), Fit(epochs=1, clip_norm=1.0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(3), nn.Linear(3, 3)
        self.tied = self.linear
        self.scale = nn.Parameter(torch.ones(1))


def names(net: nn.Module, groups: list[dict]) -> list[tuple[list[str], dict]]:
    known = {id(parameter): name for name, parameter in net.named_parameters()}
    return [
        ([known[id(p)] for p in group["params"]], {key: value for key, value in group.items() if key != "params"})
        for group in groups
    ]


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


@pytest.mark.parametrize(
    "net", [nn.Embedding(4, 2, sparse=True), nn.Sequential(nn.EmbeddingBag(4, 2, sparse=True)), Turned()]
)
def test_a_limit_of_each_number_where_there_is_none(net):
    """Before the first step, but for a part that is frozen and has no gradient."""
    world, precision = World(0, 1, CPU), Precision("fp32", CPU)
    optimizer = torch.optim.SGD(net.parameters())
    with pytest.raises(
        UserError, match="clip_value clips each gradient element, which torch can't do for sparse or complex"
    ):
        Update(Parallel(net, world), optimizer, precision, Fit(epochs=1, clip_value=1.0))
    net.requires_grad_(False)
    Update(Parallel(net, world), optimizer, precision, Fit(epochs=1, clip_value=1.0))


def in_groups(net: nn.Module, *groups: dict[str, object]) -> list[dict[str, object]]:
    return grouped(named_parameters(net), [Group.model_validate(group) for group in groups], 1.0, "optimizer")


def test_parameters_in_groups():
    net = Block()
    found = in_groups(net, {"params": ["*.bias", "LayerNorm.*"], "weight_decay": 0.0}, {"params": "sc?le", "lr": 0.5})
    assert names(net, found) == [
        (["norm.weight", "norm.bias", "linear.bias"], {"weight_decay": 0.0}),
        (["scale"], {"lr": 0.5}),
        (["linear.weight"], {}),
    ]
    assert names(net, in_groups(net, {"params": "*"})) == [
        (["scale", "norm.weight", "norm.bias", "linear.weight", "linear.bias"], {})
    ]


FACTORS = """
name: factors
model: {_target_: torch.nn.Sequential, _args_: [{_target_: torch.nn.Linear, in_features: 2, out_features: 2}]}
data: {train: {_target_: builtins.list}, batch_size: 8}
loss: {_target_: torch.nn.MSELoss}
optimizer: {_target_: torch.optim.SGD, lr: 0.5, groups: [{params: "*.bias", lr_factor: 0.1}]}
scheduler: {_target_: torch.optim.lr_scheduler.CosineAnnealingLR, T_max: 2}
fit: {epochs: 2}
"""


def test_a_factor_of_the_learning_rate_is_kept_by_the_schedule(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(FACTORS)

    def made(*overrides: str) -> torch.optim.Optimizer:
        job = load_job(path, overrides).job
        optimizer = build_optimizer(job, build_model(job, None), None)
        scheduler = build_schedulers(job, optimizer)["scheduler"]
        optimizer.step()
        scheduler.step()
        return optimizer

    assert [group["lr"] for group in made().param_groups] == pytest.approx([0.025, 0.25])
    assert [group["lr"] for group in made("optimizer.lr=2").param_groups] == pytest.approx([0.1, 1.0])
    path.write_text(FACTORS.replace("CosineAnnealingLR, T_max: 2", "OneCycleLR, max_lr: 1.0, total_steps: 4"))
    with pytest.raises(UserError, match=r"scheduler: gives all parameter groups one learning rate \(0.04\) in place"):
        made()
    assert len({group["lr"] for group in made("scheduler.max_lr=[0.1, 1.0]").param_groups}) == 2
    with pytest.raises(UserError, match=r"lr_factor: is a second learning rate; give either lr or lr_factor"):
        made("optimizer.groups.0.lr=1")
    path.write_text(FACTORS.replace("lr: 0.5", "momentum: 0.5"))
    with pytest.raises(UserError, match=r"lr_factor: is a multiple of optimizer.lr, which must be a number then"):
        made()


def test_a_pattern_that_matches_nothing():
    with pytest.raises(UserError, match=r"no parameter is called norm.wieght; did you mean norm.weight\?"):
        in_groups(Block(), {"params": "norm.wieght"})


def test_a_job_with_all_of_it(project):
    optimizer = {"_target_": "torch.optim.AdamW", "lr": 0.01, "weight_decay": 0.5}
    optimizer["groups"] = [{"params": "*.bias", "weight_decay": 0.0, "lr": 0.5}]
    project.job(optimizer=optimizer, fit={"epochs": 1, "precision": "bf16", "clip_norm": 1.0, "on_nonfinite": "skip"})
    done = project.run("launch", "--gpus", "2", "--run-dir", "run", "job.yaml")
    assert done.code == 0, done.err
    groups = final_state(project.folder / "run")["shared"]["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.0, 0.5), (0.5, 0.01)]
    assert groups[0]["params"] == ["layers.0.bias", "layers.2.bias"]


def test_a_job_with_warm_up(project):
    schedules = [
        {"_target_": "torch.optim.lr_scheduler.LinearLR", "start_factor": 0.1, "total_iters": 2},
        {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.5},
    ]
    scheduler = {"_target_": "torch.optim.lr_scheduler.SequentialLR", "schedulers": schedules, "milestones": [2]}
    project.job(scheduler=scheduler, fit={"epochs": 5}, optimizer={"_target_": "torch.optim.SGD", "lr": 0.1})
    done = project.run("launch", "--gpus", "1", "--run-dir", "run", "job.yaml")
    assert done.code == 0, done.err
    rates = [row["lr"] for row in RunDir(project.folder / "run").rows()]
    assert rates == pytest.approx([0.01, 0.055, 0.1, 0.05, 0.025])


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("fit.precision=fp16", 2, "fit.precision: fp16 needs a GPU; on the CPU use bf16"),
        ("fit.precision=fp61", 2, "fit.precision"),
        ("fit.clip_norm=0", 2, "fit.clip_norm: expected a number above 0"),
        ("optimizer.groups=[{lr: 1.0}]", 2, "optimizer.groups.0.params: missing"),
        ("optimizer.groups=[{params: nothing}]", 1, "optimizer.groups: no parameter is called nothing"),  # by the ranks
    ],
)
def test_wrong_jobs(override, code, says, project):
    done = project.run("launch", "--gpus", "1", "job.yaml", override)
    assert done.code == code
    assert says in done.err
    assert "Traceback" not in done.err


def test_contradictions(project):
    both = ("fit.clip_norm=1", "fit.clip_value=1", "fit.precision=fp16", "fit.on_nonfinite=stop")
    done = project.run("check", "job.yaml", *both)
    assert done.code == 2
    assert "fit.clip_value: is a second way of clipping" in done.err
    assert "fit.on_nonfinite: fp16's gradient scaler skips steps that overflow" in done.err
