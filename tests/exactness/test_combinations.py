"""Parts put together at random train as in a plain loop, on any number of ranks, stopped or not; or are refused.

A failure names its seed: `pytest tests/exactness/test_combinations.py -m "" -k "[SEED]"` runs that one again.
"""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from combinations import (
    BATCHES,
    EPOCHS,
    LOSSES,
    METRICS,
    MODELS,
    OPTIMIZERS,
    READY,
    SCHEDULERS,
    SIZE,
    STRATEGIES,
    VAL_SIZE,
    Combination,
    Samples,
    draw,
    loader,
    rows,
)
from marks import campaign
from ranks import run_ranks
from torch import Tensor, nn
from training import epoch_order, full, prepare

from dtrain import Trainer
from dtrain.run.folder import RUN_DIR_VARIABLE, RunDir
from dtrain.run.heartbeat import Heartbeat
from dtrain.trainer.distributed.stop import Stopped

QUICK, ALL = 10, 300
LIMITS: dict[str, float] = {"clip_norm": 0.2, "clip_value": 0.02, "ema": 0.7}


class Parts:
    """Of a combination, new ones, the same each time."""

    def __init__(self, combination: Combination) -> None:
        torch.manual_seed(combination.seed)
        self.net = MODELS[combination.model]()
        self.loss_fn = LOSSES[combination.loss].make()
        parameters = [each for each in self.net.parameters() if each.requires_grad]
        if isinstance(self.loss_fn, nn.Module) and combination.optimizer != "SparseAdam":
            parameters += self.loss_fn.parameters()
        self.optimizer = OPTIMIZERS[combination.optimizer](parameters)
        self.interval, make = SCHEDULERS[combination.scheduler]
        self.scheduler = make(self.optimizer)
        self.train, self.val = Samples(combination, SIZE), Samples(combination, VAL_SIZE)


# --- with dtrain


def with_dtrain(rank: int, world_size: int, folder: str, combination: Combination) -> Any:
    """What is left of the training on this rank: None where it was stopped, the text of a refusal, or its results."""
    os.environ[RUN_DIR_VARIABLE] = folder
    try:
        return _fit(combination, folder, is_first=not RunDir(folder).latest.exists())
    except Stopped:
        return None


def _fit(combination: Combination, folder: str, *, is_first: bool) -> Any:
    parts = Parts(combination)
    if is_first and combination.stop_after is not None:
        _ask_to_stop(parts.optimizer, combination.stop_after, folder)
    trainer = Trainer(
        parts.net,
        None if combination.is_step else parts.loss_fn,
        parts.optimizer,
        {name: METRICS[name].make() for name in combination.metrics},
        step=_step(combination, parts.loss_fn) if combination.is_step else None,
        scheduler=parts.scheduler,
        scheduler_interval=parts.interval,
        activations={name: METRICS[name].activation for name in combination.metrics if METRICS[name].activation},
        strategy=STRATEGIES[combination.strategy],
        micro_batch_size=combination.micro_batch_size,
        unused_parameters="allow" if combination.model == "experts" and combination.strategy == "ddp" else "refuse",
        device="cpu",
        seed=combination.seed,
        **{name: LIMITS[name] for name in combination.limits},
    )
    val_data = loader(combination, combination.val_loader, parts.val)
    history = trainer.fit(loader(combination, combination.loader, parts.train), val_data, EPOCHS)
    weights = {name: full(value).clone() for name, value in trainer.model.state_dict().items()}
    return history.to_dict("records"), weights, trainer.evaluate(loader(combination, "in order", parts.val))


def _step(combination: Combination, loss_fn: Any) -> Callable[[nn.Module, Any], dict[str, Any]]:
    units, open_batch = LOSSES[combination.loss].units, BATCHES[combination.batch].open

    def step(model: nn.Module, batch: Any) -> dict[str, Any]:
        x, y = open_batch(batch)
        predictions = model(x)
        result = {"loss": loss_fn(predictions, y), "predictions": predictions, "target": y}
        if combination.weighs:
            result["weight"] = units(predictions, y)
        if "size" in combination.metrics:
            result["metrics"] = {"size": (x.norm(dim=1),)}
        return result

    return step


def _ask_to_stop(optimizer: torch.optim.Optimizer, step: int, folder: str) -> None:
    """Ask for a stop after that step, on the last rank."""
    steps = itertools.count()

    def ask(*_: Any) -> None:
        if next(steps) == step and dist.get_rank() == dist.get_world_size() - 1:
            Heartbeat(RunDir(folder).heartbeat(dist.get_rank())).stop = signal.SIGTERM

    optimizer.register_step_post_hook(ask)
    ask()


# --- with a plain loop


def with_a_plain_loop(combination: Combination) -> Any:
    """The rows of the history, the weights, their moving average, and the last validation: in one process."""
    parts = Parts(combination)
    net, loss_fn, optimizer = parts.net, parts.loss_fn, parts.optimizer
    frozen = [module for module in net.modules() if not module.training]
    trained = [each for group in optimizer.param_groups for each in group["params"]]
    decay = LIMITS["ema"] if "ema" in combination.limits else None
    average = {name: value.detach().clone() for name, value in net.named_parameters()}
    history: list[dict[str, Any]] = []
    for epoch in range(1, EPOCHS + 1):
        net.train()
        for module in frozen:
            module.eval()
        phase = Phase("train", combination)
        for x, y in _batches(combination, combination.loader, parts.train, epoch):
            predictions = net(x)
            loss = loss_fn(predictions, y)
            optimizer.zero_grad()
            loss.backward()
            if "clip_norm" in combination.limits:
                _clip_norm(trained)
            if "clip_value" in combination.limits:
                nn.utils.clip_grad_value_(trained, LIMITS["clip_value"])
            optimizer.step()
            if parts.interval == "step":
                parts.scheduler.step()
            for name, value in net.named_parameters():
                if (decay is not None and value.is_floating_point()) or value.is_complex():
                    average[name] = (decay or 0) * average[name] + (1 - (decay or 0)) * value.detach()
            phase.add(x, y, predictions.detach(), float(loss))
        row = {"epoch": epoch, **phase.values()}
        batches = list(_batches(combination, combination.val_loader, parts.val, epoch))
        row |= validation(combination, "val", net, loss_fn, batches)
        if decay is not None:
            averaged = copy.deepcopy(net)
            averaged.load_state_dict(average, strict=False)
            row |= validation(combination, "ema", averaged, loss_fn, batches)
        history.append(row)
        if parts.interval == "epoch" and parts.scheduler is not None:
            parts.scheduler.step(*[row["val_loss"]] * (combination.scheduler == "plateau"))
    batches = _batches(combination, "in order", parts.val, 1)
    return history, net.state_dict(), validation(combination, "val", net, loss_fn, batches)


def validation(combination: Combination, name: str, net: nn.Module, loss_fn: Any, batches: Any) -> dict[str, Any]:
    phase = Phase(name, combination)
    net.eval()
    with torch.no_grad():
        for x, y in batches:
            predictions = net(x)
            phase.add(x, y, predictions, float(loss_fn(predictions, y)))
    return phase.values()


class Phase:
    """The loss over all units of an epoch, and metrics of all its samples."""

    def __init__(self, name: str, combination: Combination) -> None:
        self.name, self.units = name, LOSSES[combination.loss].units
        if combination.is_step and not combination.weighs:
            self.units = rows  # dtrain takes what a step doesn't weigh for a mean over samples
        self.losses: list[tuple[float, float]] = []
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.metrics = [key for key in combination.metrics if name != "train" or METRICS[key].on_training]

    def add(self, x: Tensor, y: Tensor, predictions: Tensor, loss: float) -> None:
        units = 1.0 if self.units is None else self.units(predictions, y)
        self.losses.append((loss if units else 0.0, units))
        self.seen.append((x, y, predictions))

    def values(self) -> dict[str, Any]:
        x, y, predictions = (torch.cat(each) for each in zip(*self.seen, strict=True))
        units = sum(weight for _, weight in self.losses)
        found: dict[str, Any] = {"loss": sum(loss * weight for loss, weight in self.losses) / units}
        for name in self.metrics:
            metric = METRICS[name].make()
            given = predictions.softmax(1) if METRICS[name].activation else predictions
            if not isinstance(metric, nn.Module):
                found[name] = metric(given, y)
                continue
            metric.update(*[x.norm(dim=1)] if name == "size" else [given, y])
            value = metric.compute()
            found |= (
                {f"{name}_{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
            )
        return {f"{self.name}_{name}": np.asarray(value).tolist() for name, value in found.items()}


def _batches(combination: Combination, name: str, samples: Samples, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = epoch_order(len(samples), combination.seed, epoch).tolist()
    # Of a stream that does not divide itself, torch's loading processes would each give all.
    batches = loader(replace(combination, workers=0), name, samples, order)
    if hasattr(getattr(batches, "batch_sampler", None), "set_epoch"):
        batches.batch_sampler.set_epoch(epoch)
    open_batch = BATCHES[combination.batch].open
    for batch in batches:
        x, y = batch if open_batch is None else open_batch(batch)
        yield torch.as_tensor(x), torch.as_tensor(y)


def _clip_norm(parameters: list[Tensor]) -> None:
    gradients = [each.grad for each in parameters if each.grad is not None]
    norm = sum(float((each.coalesce().values() if each.is_sparse else each).abs().square().sum()) for each in gradients)
    for gradient in gradients:
        gradient.mul_(min(1.0, LIMITS["clip_norm"] / norm**0.5))


# --- compared


def refusals(combination: Combination) -> list[str]:
    """Words of refusals, of which one must come; nothing where it must train."""
    loss, name = LOSSES[combination.loss], combination.batch
    found = []
    if combination.is_cut:
        is_believed = not combination.weighs if combination.is_step else not loss.is_torchs
        if is_believed and name == "graph" and combination.loader not in READY:
            found += ["does not make a row or an entry of each"]
        if is_believed and (not loss.is_regular or loss.units is None):
            found += ["is not a mean over samples", "it is their sum", "a step then returns its `weight`"]
        is_micro = combination.micro_batch_size is not None
        for loader_name, ranks in (
            (combination.loader, max(combination.ranks, combination.resumed_ranks)),
            (combination.val_loader, combination.resumed_ranks),
        ):
            if name in ("graph", "dataclass") and loader_name in READY and (ranks > 1 or is_micro):
                found += ["can't be cut"]
    if combination.loss == "Tempered" and combination.optimizer != "SparseAdam":
        found += ["belong neither to the model nor to the loss"] if combination.is_step else []
        found += ["by ddp only"] if combination.strategy != "ddp" else []
    if combination.strategy != "ddp":
        found += {"sparse": ["sparse gradients"], "complex": ["is a scalar"]}.get(combination.model, [])
    if combination.strategy == "fsdp":
        found += ["are one parameter, used in two blocks"] if combination.model == "tied" else []
    elif combination.strategy != "ddp":
        found += ["DeepSpeed exchanges Adagrad"] if combination.optimizer == "Adagrad" else []
        found += ["fit.ema"] if combination.strategy == "ZeRO 3" and "ema" in combination.limits else []
    if {"clip_norm", "clip_value"} <= set(combination.limits):
        found += ["is a second way of clipping"]
    if combination.model in ("sparse", "complex") and "clip_value" in combination.limits:
        found += ["fit.clip_value"]
    return found


def possible_refusals(combination: Combination) -> list[str]:
    """Of those that depend on where it was stopped: moments of what several ranks have seen."""
    is_moved = combination.ranks not in (1, combination.resumed_ranks)
    return ["cannot continue in the middle of an epoch"] if is_moved and "pearson" in combination.metrics else []


@pytest.mark.parametrize("seed", [*range(QUICK), *map(campaign, range(QUICK, ALL))])
@pytest.mark.filterwarnings("ignore")
def test_a_random_combination_trains_as_in_a_plain_loop_or_is_refused(tmp_path, seed):
    compare(draw(seed), tmp_path)


def is_stopped(combination: Combination) -> bool:
    """Whether there is a step after the one after which a stop is asked for."""
    steps = len(list(_batches(combination, combination.loader, Parts(combination).train, 1)))
    return combination.stop_after is not None and combination.stop_after < EPOCHS * steps


def compare(combination: Combination, folder: Path) -> None:
    expected = refusals(combination)
    run = folder / "run"
    prepare(run, max(combination.ranks, combination.resumed_ranks))
    try:
        found = run_ranks(combination.ranks, with_dtrain, str(run), combination)
        if is_stopped(combination):
            assert found == [None] * combination.ranks, "it was to be stopped"
            for rank in range(combination.resumed_ranks):
                Heartbeat(RunDir(run).heartbeat(rank), create=True)
            found = run_ranks(combination.resumed_ranks, with_dtrain, str(run), combination)
    except RuntimeError as error:
        _, is_refused, reason = str(error).partition("UserError: ")
        if is_refused and any(words in reason for words in expected + possible_refusals(combination)):
            return
        raise
    assert not expected, f"it should be refused: {expected}"
    history, weights, evaluated = with_a_plain_loop(combination)
    # What a batch's loss is per sample is anybody's guess where samples have several rows, or none, and nobody says.
    is_told = combination.weighs if combination.is_step else combination.loss != "sum"
    left_out = None if is_told or not BATCHES[combination.batch].is_uneven else "_loss"
    for its_rows, its_weights, its_evaluated in found:
        for row, its_row in zip([*history, evaluated], [*its_rows, its_evaluated], strict=True):
            its_row = {
                name: value
                for name, value in its_row.items()
                if name not in ("step", "lr", "samples_per_s", "phase", "time")
            }
            assert row.keys() == its_row.keys()
            compared = [name for name in row if not (left_out and name.endswith(left_out))]
            assert_close({name: row[name] for name in compared}, its_row)
        assert weights.keys() == its_weights.keys()
        assert_close(weights, its_weights)


def assert_close(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in expected.items():
        its = torch.as_tensor(found[name])
        torch.testing.assert_close(
            its,
            torch.as_tensor(value, dtype=its.dtype),
            rtol=1e-5,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
