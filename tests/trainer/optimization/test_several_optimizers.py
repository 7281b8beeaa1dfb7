"""Several optimizers: over one loss, and each over one of a step's losses, as plain loops have them."""

from __future__ import annotations

import copy
import itertools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau
from training import Job, Samples, differences, epoch_order, final_state, train

from dtrain.errors import UserError
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.schema.instantiate import check_job
from dtrain.schema.job import LoadedJob
from dtrain.schema.loading import load_job
from dtrain.trainer.entrypoints.train import build_model, build_optimizer, build_schedulers
from dtrain.trainer.optimization.scheduling import Scheduling
from dtrain.trainer.trainer import Trainer

SEED, EPOCHS, BATCH, SIZE = 3, 2, 12, 40  # 3 batches of 12, and one of 4
LOSS = nn.BCEWithLogitsLoss()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 8)
        self.deep = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.tanh(self.deep(torch.tanh(self.wide(features)))))
        return out


class Gan(nn.Module):
    """A generator and a discriminator of points in a plane."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))


def data() -> Samples:
    drawn = torch.Generator().manual_seed(1)
    return Samples(torch.randn(SIZE, 2, generator=drawn) + 1, torch.randn(SIZE, 3, generator=drawn))


def classes() -> Samples:
    drawn = torch.Generator().manual_seed(1)
    return Samples(torch.randn(SIZE, 6, generator=drawn), torch.randint(2, (SIZE,), generator=drawn))


def judged(model: Gan, points: torch.Tensor, real: float) -> torch.Tensor:
    logits = model.discriminator(points)
    return LOSS(logits, torch.full_like(logits, real))


def gan_step(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    points, noise = batch
    made = model.generator(noise)
    loss = judged(model, points, 1.0) + judged(model, made.detach(), 0.0)
    yield {"optimizer": "discriminator", "loss": loss, "log": {"real": model.discriminator(points).mean()}}
    yield {"optimizer": "generator", "loss": judged(model, made, 1.0)}


def gan(norm: bool = False) -> tuple[Gan, dict[str, torch.optim.Optimizer], dict[str, Any]]:
    torch.manual_seed(SEED)
    model = Gan(norm)
    optimizers = {
        "generator": torch.optim.Adam(model.generator.parameters(), lr=0.02, betas=(0.5, 0.9)),
        "discriminator": torch.optim.SGD(model.discriminator.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    }
    return model, optimizers, {"generator": ExponentialLR(optimizers["generator"], 0.9)}


def gan_job(options: dict[str, Any], norm: bool = False) -> Job:
    model, optimizers, schedulers = gan(norm)
    trainer = {"net": model, "step": gan_step, "optimizer": optimizers, "scheduler": schedulers, "seed": SEED}
    trainer |= {"scheduler_interval": "step", **options}
    return {"trainer": trainer, "train": data(), "val": data(), "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


def plain_gan(
    clip_norm: float | None = None, rows: list[dict[str, float]] | None = None, *, has_still_norm: bool = False
) -> dict[str, torch.Tensor]:
    """A loop as people write it."""
    model, optimizers, schedulers = gan(has_still_norm)
    if has_still_norm:
        model.generator[1].eval().requires_grad_(False)
    points, noise = data().features, data().target
    for epoch in range(1, EPOCHS + 1):
        sums = dict.fromkeys(("discriminator_loss", "generator_loss", "real"), 0.0)
        for batch in epoch_order(SIZE, SEED, epoch).split(BATCH):
            losses = gan_step(model, (points[batch], noise[batch]))
            for result in losses:
                optimizer = optimizers[result["optimizer"]]
                optimizer.zero_grad()
                result["loss"].backward()
                if clip_norm:
                    own = [each for group in optimizer.param_groups for each in group["params"]]
                    nn.utils.clip_grad_norm_(own, clip_norm)
                optimizer.step()
                sums[f"{result['optimizer']}_loss"] += len(batch) * float(result["loss"].detach())
                for name, value in result.get("log", {}).items():
                    sums[name] += len(batch) * float(value.detach())
            schedulers["generator"].step()
        if rows is not None:
            rows.append({f"train_{name}": value / SIZE for name, value in sums.items()})
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, {}),
        (1, {"micro_batch_size": 5}),
        (2, {"clip_norm": 0.05}),
        (3, {"micro_batch_size": 3}),
        (2, {"strategy": "fsdp"}),
        (3, {"strategy": "fsdp", "micro_batch_size": 3, "clip_norm": 0.05}),
    ],
    ids=str,
)
def test_a_gan_is_that_of_a_plain_loop(ranks, options, tmp_path):
    rows: list[dict[str, float]] = []
    expected = plain_gan(options.get("clip_norm"), rows)
    for history, weights in train(ranks, tmp_path, gan_job, options):
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
        for row, plain in zip(history, rows, strict=True):
            assert {name: row[name] for name in plain} == pytest.approx(plain, rel=1e-5)
            assert row["train_loss"] == row["train_generator_loss"]
            assert {"val_discriminator_loss", "val_generator_loss", "val_real", "val_loss"} <= row.keys()


def test_a_rank_without_samples_leaves_what_others_keep_from_loss_to_loss(tmp_path):
    """3 ranks have 4 samples one by one, so that two only take part in the second micro-batch."""
    options = {"micro_batch_size": 1, "freeze": "generator.1.*"}
    expected = plain_gan(has_still_norm=True)
    for _, weights in train(3, tmp_path, gan_job, options, True):
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def critic_step(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    """The critic learns twice for each time that the generator does, by means over pairs of some weight."""
    points, noise = batch
    weights = noise[:, 0].abs()
    for fresh in (noise, -noise):
        apart = model.discriminator(model.generator(fresh).detach()) - model.discriminator(points)
        loss = (weights[:, None] * (apart + 0.1 * apart**2)).sum() / weights.sum()
        yield {"optimizer": "discriminator", "loss": loss, "weight": weights.sum()}
    yield {"optimizer": "generator", "loss": -model.discriminator(model.generator(noise)).mean()}


def critic_job(options: dict[str, Any]) -> Job:
    job = gan_job(options)
    return job | {"trainer": {**job["trainer"], "step": critic_step, "scheduler": None}}


@pytest.mark.parametrize(("ranks", "options"), [(1, {"micro_batch_size": 5}), (3, {"micro_batch_size": 3, "l2": 0.01})])
def test_an_optimizer_may_learn_from_several_of_the_losses_each_with_its_weight(ranks, options, tmp_path):
    model, optimizers, _ = gan()
    for epoch in range(1, EPOCHS + 1):
        for batch in epoch_order(SIZE, SEED, epoch).split(BATCH):
            for result in critic_step(model, (data().features[batch], data().target[batch])):
                optimizer = optimizers[result["optimizer"]]
                optimizer.zero_grad()
                own = getattr(model, result["optimizer"])
                penalty = sum((parameter**2).sum() for parameter in own.parameters() if parameter.dim() > 1)
                (result["loss"] + options.get("l2", 0.0) / 2 * penalty).backward()
                optimizer.step()
    for _, weights in train(ranks, tmp_path, critic_job, options):
        for name, value in weights.items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def late_job(options: dict[str, Any]) -> Job:
    return gan_job({**options, "freeze": {"patterns": "generator.*", "until": 5}})


@pytest.mark.parametrize(
    ("ranks", "options"), [(1, {}), (2, {"micro_batch_size": 3}), (2, {"strategy": "fsdp"})], ids=str
)
def test_one_that_has_nothing_to_train_yet_waits(ranks, options, tmp_path):
    model, optimizers, schedulers = gan()
    step = 0
    for epoch in range(1, EPOCHS + 1):
        for batch in epoch_order(SIZE, SEED, epoch).split(BATCH):
            step += 1
            for result in gan_step(model, (data().features[batch], data().target[batch])):
                if result["optimizer"] == "discriminator" or step > 5:
                    optimizers[result["optimizer"]].zero_grad()
                    result["loss"].backward()
                    optimizers[result["optimizer"]].step()
            schedulers["generator"].step()
    for _, weights in train(ranks, tmp_path, late_job, options):
        for name, value in weights.items():
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-5, atol=1e-6)


def two_over_one(net: Net) -> tuple[dict[str, torch.optim.Optimizer], dict[str, Any]]:
    matrices = [net.wide.weight, net.deep.weight]
    rest = [parameter for parameter in net.parameters() if all(parameter is not each for each in matrices)]
    optimizers = {"matrices": torch.optim.Muon(matrices, lr=0.02), "rest": torch.optim.AdamW(rest, lr=0.01)}
    return optimizers, {
        "matrices": CosineAnnealingLR(optimizers["matrices"], EPOCHS),
        "rest": ExponentialLR(optimizers["rest"], 0.9),
    }


def two_over_one_job(options: dict[str, Any], stop_after: int | None = None) -> Job:
    torch.manual_seed(SEED)
    net = Net()
    optimizers, schedulers = two_over_one(net)
    trainer = {"net": net, "loss_fn": nn.CrossEntropyLoss(), "optimizer": optimizers, "scheduler": schedulers}
    trainer |= {"scheduler_interval": {"matrices": "epoch", "rest": "step"}, "seed": SEED, **options}
    trainer |= {"callbacks": [Looks(["matrices", "rest"])]}
    ask_to_stop(optimizers["rest"], stop_after)
    return {"trainer": trainer, "train": classes(), "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


def ask_to_stop(optimizer: torch.optim.Optimizer, step: int | None) -> None:
    steps = itertools.count(1)

    def ask(*_: Any) -> None:
        if next(steps) == step:
            Heartbeat(RunDir(os.environ[RUN_DIR_VARIABLE]).heartbeat(dist.get_rank())).stop = signal.SIGTERM

    optimizer.register_step_post_hook(ask)


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "ddp"), (3, "ddp"), (2, "fsdp")])
def test_two_over_one_loss_are_those_of_a_plain_loop(ranks, strategy, tmp_path):
    """The norm that limits the gradient is that of all parameters; each optimizer has a schedule of its own."""
    torch.manual_seed(SEED)
    net = Net()
    optimizers, schedulers = two_over_one(net)
    rates = []
    for epoch in range(1, EPOCHS + 1):
        for batch in epoch_order(SIZE, SEED, epoch).split(BATCH):
            rates.append([each.param_groups[0]["lr"] for each in optimizers.values()])
            net.zero_grad()
            nn.functional.cross_entropy(net(classes().features[batch]), classes().target[batch]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.2)
            for each in optimizers.values():
                each.step()
            schedulers["rest"].step()
        schedulers["matrices"].step()
    for history, weights in train(ranks, tmp_path, two_over_one_job, {"clip_norm": 0.2, "strategy": strategy}):
        precision = 1e-4 if strategy == "ddp" else 5e-3  # Muon computes in bfloat16, and fsdp with parts
        for name, value in weights.items():
            torch.testing.assert_close(value, net.state_dict()[name], rtol=precision, atol=precision)
        for row in history:
            matrices, rest = rates[row["step"] - 1]
            assert (row["lr"], row["lr_matrices"], row["lr_rest"]) == pytest.approx((matrices, matrices, rest))


class Alternating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.net = nn.Linear(6, 2)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(features)
        return out


def alternating(model: nn.Module, batch: Any) -> Iterator[dict[str, Any]]:
    """Two steps of one optimizer, of which the first alone has predictions."""
    features, target = batch
    predictions = model(features)
    yield {"loss": nn.functional.cross_entropy(predictions, target), "predictions": predictions, "target": target}
    yield {"loss": model(features).square().mean()}


class Looks:
    """A callback that finds the optimizers by their names, and takes their states as any optimizer's."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def on_end(self, fit: Any) -> None:
        assert list(fit.optimizer.members) == self.names
        before = copy.deepcopy(fit.optimizer.state_dict())
        for group in fit.optimizer.param_groups:
            group["lr"] = 7.0
        fit.optimizer.load_state_dict(before)
        assert differences(fit.optimizer.state_dict(), before) == []


def alternating_job() -> Job:
    net = Alternating()
    trainer = {"net": net, "step": alternating, "optimizer": torch.optim.Adam(net.parameters(), lr=0.05), "seed": SEED}
    trainer |= {"metrics_dict": {"acc": lambda predictions, target: (predictions.argmax(1) == target).float().mean()}}
    return {"trainer": trainer, "train": classes(), "val": classes(), "batch_size": BATCH, "fit": {"epochs": EPOCHS}}


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_single_optimizer_may_learn_from_one_loss_after_another(ranks, tmp_path):
    net = Alternating()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for epoch in range(1, EPOCHS + 1):
        for batch in epoch_order(SIZE, SEED, epoch).split(BATCH):
            for result in alternating(net, (classes().features[batch], classes().target[batch])):
                optimizer.zero_grad()
                result["loss"].backward()
                optimizer.step()
    accuracy = float((net(classes().features).argmax(1) == classes().target).float().mean())
    for history, weights in train(ranks, tmp_path, alternating_job):
        for name, value in weights.items():
            torch.testing.assert_close(value, net.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert history[-1]["val_acc"] == pytest.approx(accuracy)  # of the last loss that has predictions


def stopped_gan_job(options: dict[str, Any], stop_after: int | None = None) -> Job:
    job = gan_job(options, norm=True)
    ask_to_stop(job["trainer"]["optimizer"]["discriminator"], stop_after)
    return job


@pytest.mark.parametrize(
    ("make", "options"),
    [(stopped_gan_job, {"micro_batch_size": 3}), (two_over_one_job, {}), (stopped_gan_job, {"strategy": "fsdp"})],
    ids=["losses", "one loss", "fsdp"],
)
def test_a_run_that_was_stopped_continues_to_the_same_bits(make, options, tmp_path):
    expected = train(2, tmp_path / "whole", make, options)[0]
    assert train(2, tmp_path / "parts", make, options, 3) == [None, None]
    assert len(train(2, tmp_path / "parts", make, options, 2)) == 2
    assert differences(train(2, tmp_path / "parts", make, options)[0][1], expected[1]) == []
    assert differences(final_state(tmp_path / "parts"), final_state(tmp_path / "whole")) == []


def other_on_rank_1(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    losses = list(gan_step(model, batch))
    yield from losses if dist.get_rank() == 0 else losses[:1]


class Growing:
    """Yields one loss, and from the third batch on two."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
        self.batches += 1
        yield from itertools.islice(gan_step(model, batch), 1 if self.batches < 3 else 2)


def nameless(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    yield {"loss": model.discriminator(batch[0]).mean()}


def misnamed(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    yield {"loss": model.discriminator(batch[0]).mean(), "optimizer": "discriminater"}


def unlearned(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    yield {"loss": model.discriminator(batch[0]).mean(), "optimizer": "generator"}


def partly(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    yield {"loss": model.discriminator[2](torch.ones(len(batch[0]), 8)).mean(), "optimizer": "discriminator"}


def none_at_all(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    yield from ()


def twice_called(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    for result in gan_step(model, batch):
        yield {**result, "log": {"same": 1.0}}


def keyed(model: Gan, batch: Any) -> Iterator[dict[str, Any]]:
    yield {"loss": model.discriminator(batch[0]).mean(), "optimiser": "discriminator"}


def bad_job(step: Any, options: dict[str, Any]) -> Job:
    job = gan_job(options)
    return job | {"trainer": {**job["trainer"], "step": step, "scheduler": None}, "val": None}


@pytest.mark.parametrize(
    ("step", "ranks", "options", "says"),
    [
        (other_on_rank_1, 2, {}, "yields its loss number 2 for generator on rank 0, and not at all on rank 1"),
        (Growing(), 1, {}, "number 2 for generator, and not at all in the first step: yield the same losses for each"),
        (nameless, 1, {}, "without the name of its `optimizer`; known: discriminator, generator"),
        (misnamed, 1, {}, "a loss for the optimizer discriminater; did you mean discriminator?"),
        (unlearned, 1, {}, "the loss depends on none of the model's parameters that this Adam trains"),
        (partly, 2, {}, "the loss does not depend on the parameters discriminator.0.weight, discriminator.0.bias"),
        (none_at_all, 1, {}, "step yielded no loss"),
        (twice_called, 1, {}, "step logs same with two of its losses"),
        (keyed, 1, {}, "step yielded the unknown key 'optimiser'; did you mean optimizer?"),
        (gan_step, 1, {"strategy": {"zero_optimization": {"stage": 1}}}, "DeepSpeed trains with one optimizer"),
    ],
)
def test_a_step_that_cannot_be_followed(step, ranks, options, says, tmp_path):
    with pytest.raises(RuntimeError, match=re.escape(says)):
        train(ranks, tmp_path, bad_job, step, options)


def trainer_of(make: Any, **given: Any) -> Trainer:
    net = Net()
    return Trainer(net, nn.CrossEntropyLoss(), make(net), **given, device="cpu")


def adam(part: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(part.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda net: {"a": adam(net), "b": adam(net.head)}, "optimizer.b: trains parameters that a trains too"),
        (
            lambda net: {"a": adam(net), "b": adam(nn.Linear(2, 2))},
            "optimizer.b: none of the 2 parameters of",
        ),
        (
            lambda net: {"a": adam(net.wide), "b": torch.optim.LBFGS(net.head.parameters())},
            "b: LBFGS computes",
        ),
        (lambda net: {"a": net.wide}, "optimizer.a: Linear is no optimizer: it lacks step"),
        (lambda net: {"a-b": adam(net)}, "optimizer: 'a-b' can't be an optimizer's name"),
        (lambda net: {}, "optimizer: '' can't be an optimizer's name"),
    ],
)
def test_optimizers_that_cannot_be_together(make, says):
    with pytest.raises(UserError, match=re.escape(says)):
        trainer_of(make)


def test_a_scheduler_of_no_optimizer():
    optimizers: dict[str, Any] = {}

    def make(net: Net) -> Any:
        optimizers.update(wide=adam(net.wide), head=adam(net.head))
        return optimizers

    with pytest.raises(UserError, match=r"scheduler.hed: no optimizer is called hed; did you mean head\?"):
        trainer_of(make, scheduler={"hed": ExponentialLR(adam(nn.Linear(1, 1)), 0.9)})
    with pytest.raises(UserError, match=r"head: this ExponentialLR changes the learning rates of an optimizer"):
        trainer_of(make, scheduler={"head": ExponentialLR(optimizers["wide"], 0.9)})
    plateaus = {name: ReduceLROnPlateau(each) for name, each in optimizers.items()}
    given = Scheduling.of(plateaus, monitor={"wide": "val_loss", "head": "train_loss"})
    assert given.monitors == ["val_loss", "train_loss"]
    with pytest.raises(UserError, match=r"interval: expected epoch or step, found 'batch'"):
        trainer_of(make, scheduler_interval={"head": "batch"})


JOB = """
name: several
model: {_target_: torch.nn.Sequential, _args_: [
  {_target_: torch.nn.Linear, in_features: 6, out_features: 4},
  {_target_: torch.nn.Linear, in_features: 4, out_features: 2}]}
data: {train: {_target_: builtins.list}, batch_size: 8}
loss: {_target_: torch.nn.CrossEntropyLoss}
optimizer:
  first: {_target_: torch.optim.Muon, params: 0.weight, lr: 0.1}
  rest: {_target_: torch.optim.AdamW, lr: 0.01, groups: [{params: "*.bias", weight_decay: 0.0}]}
scheduler: {_target_: torch.optim.lr_scheduler.ExponentialLR, gamma: 0.5}
fit: {epochs: 1}
"""


def built(tmp_path: Path, *overrides: str, text: str = JOB) -> tuple[dict[str, Any], dict[str, Any]]:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    job = load_job(path, overrides).job
    optimizers = build_optimizer(job, build_model(job, None), None)
    return optimizers, build_schedulers(job, optimizers)


def test_a_job_shares_out_its_parameters_by_patterns(tmp_path):
    optimizers, schedulers = built(tmp_path)
    shapes = {
        name: [[tuple(parameter.shape) for parameter in group["params"]] for group in each.param_groups]
        for name, each in optimizers.items()
    }
    assert shapes == {"first": [[(4, 6)]], "rest": [[(4,), (2,)], [(2, 4)]]}
    for name, rates in (("first", [0.05]), ("rest", [0.005, 0.005])):  # a scheduler like this for each
        optimizers[name].step()
        schedulers["scheduler"][name].step()
        assert [group["lr"] for group in optimizers[name].param_groups] == pytest.approx(rates)
    own = "{rest: {_target_: torch.optim.lr_scheduler.ExponentialLR, gamma: 0.5, interval: step}}"
    assert list(built(tmp_path, f"scheduler={own}")[1]["scheduler"]) == ["rest"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optimizer.first.params=0.wieght", r"optimizer.first.params: no parameter is called 0.wieght; did you mean 0"),
        ("optimizer.rest.params='*'", r"optimizer.rest.params: 0.weight is trained by first too"),
        ("optimizer.rest.params=1.*", r"optimizer: none of them trains 0.bias; give it to one of them, or freeze it"),
        (
            "optimizer.first.params=[]",
            r"optimizer.rest.params: missing; only one optimizer can train what no",
        ),
        ("optimizer.first.params='*'", r"optimizer.rest: there is nothing left for it to train"),
        ("optimizer.first.lr=-1", r"optimizer.first.lr: expected a positive number, found -1"),
        ("optimizer.rest.groups=[{params: '0.weight'}]", r"optimizer.rest.groups: no parameter is called 0.weight"),
        ("scheduler={frist: {_target_: torch.optim.lr_scheduler.ExponentialLR}}", r"no optimizer is called frist"),
        (
            "scheduler={rest: {_target_: torch.optim.Adam}}",
            r"scheduler.rest._target_: is an optimizer, not",
        ),
        ("fit.strategy=deepspeed", r"optimizer: DeepSpeed trains with one optimizer; several need ddp or fsdp"),
        ("optimizer={a-b: {_target_: torch.optim.SGD}}", r"optimizer.a-b"),
    ],
)
def test_a_jobs_optimizers_that_are_wrong(override, says, tmp_path):
    with pytest.raises(UserError, match=says):
        built(tmp_path, override)


def test_a_jobs_optimizers_are_checked_by_their_signatures(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    loaded = load_job(
        path, ["optimizer.first.momentun=1", "scheduler={rest: {_target_: torch.optim.lr_scheduler.StepL}}"]
    )
    assert isinstance(loaded, LoadedJob)
    first, second, *_ = [str(problem) for problem in check_job(loaded, tmp_path)]
    assert "optimizer.first.momentun: torch.optim.Muon takes no argument momentun" in first
    assert "scheduler.rest" in second
