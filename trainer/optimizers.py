"""What optimizers beyond torch's want of a loop: gradients made again within a step, other weights to be judged by."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.errors import Problem, UserError


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step makes the gradients itself, as LBFGS's: `step(closure)`, the argument not to be left out."""
    if is_two_step(optimizer):
        return True
    needed = [p for p in inspect.signature(type(optimizer).step).parameters.values() if p.default is p.empty]
    return len([p for p in needed if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]) > 1  # beside self


def is_two_step(optimizer: Optimizer) -> bool:
    """Whether it begins with the batch's gradient, and has the closure make another one: sharpness-aware minimisation.

    (Foret et al., ICLR 2021.) Its implementations have their two halves under these names.
    """
    return hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")


def has_modes(optimizer: Any) -> bool:
    """Whether it trains other weights than those that are to be judged and kept, as schedule-free ones do.

    (Defazio et al., The Road Less Scheduled, NeurIPS 2024.)
    """
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def start_training(optimizer: Any) -> None:
    """Have it hold the weights that are trained."""
    if has_modes(optimizer):
        optimizer.train()


def stop_training(optimizer: Any) -> None:
    """Have it hold the weights that are to be judged and kept."""
    if has_modes(optimizer):
        optimizer.eval()


@contextlib.contextmanager
def judged(optimizer: Any) -> Iterator[None]:
    """Around an evaluation, or while weights are copied: in the block the model has those to be judged by.

    Afterwards it has the very same as before: to compute them back and forth would round them, and how often a run is
    evaluated and saved would tell.
    """
    if not has_modes(optimizer):
        yield
        return
    trained = [parameter.detach().clone() for parameter in _parameters(optimizer)]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, before in zip(_parameters(optimizer), trained, strict=True):
                parameter.copy_(before)


def require_rates(optimizer: Optimizer, *, is_scheduled: bool) -> None:
    """Raise UserError where no learning rate is one that anything can be trained with."""
    rates = [group["lr"] for group in optimizer.param_groups if isinstance(group.get("lr"), int | float | Tensor)]
    if wrong := [float(rate) for rate in rates if not (math.isfinite(rate) and rate >= 0)]:
        raise UserError(Problem(f"a learning rate is {wrong[0]}: it must be a positive number", "optimizer.lr"))
    if rates and not any(rates) and not is_scheduled:
        raise UserError(Problem("the learning rate is 0, and no scheduler raises it", "optimizer.lr"))


def refused_without_closure(optimizer: Optimizer, error: Exception) -> UserError | None:
    """In words, that an optimizer's `step` has refused to be called without a closure; None for another error."""
    if "closure" not in f"{type(error).__name__} {error}".lower():
        return None
    name = type(optimizer).__name__
    return UserError(
        f"{name}.step wants a closure, but doesn't show it ({error}): it gets one where its parameter has no default, "
        "`def step(self, closure)`, or where the class has first_step and second_step"
    )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
