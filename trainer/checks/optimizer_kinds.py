"""What unusual optimizers need from a loop: gradients recomputed within a step, other weights for evaluation."""

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

from ..model.optimizers import members_of


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step computes the gradients itself, as LBFGS's does: `step(closure)` with a required argument."""
    if is_two_step(optimizer):
        return True
    needed = [p for p in inspect.signature(type(optimizer).step).parameters.values() if p.default is p.empty]
    return len([p for p in needed if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]) > 1  # beside self


def is_two_step(optimizer: Optimizer) -> bool:
    """Whether it starts from the batch's gradient and has the closure compute another: sharpness-aware minimisation.

    (Foret et al., ICLR 2021.) Its implementations have their two halves under these names.
    """
    return hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")


def has_modes(optimizer: Any) -> bool:
    """Whether the weights that it trains differ from those to evaluate and save, as in schedule-free optimizers.

    (Defazio et al., The Road Less Scheduled, NeurIPS 2024.)
    """
    return bool(_with_modes(optimizer))


def _with_modes(optimizer: Any) -> list[Any]:
    methods = ("train", "eval")
    return [each for each in members_of(optimizer) if all(callable(getattr(each, name, None)) for name in methods)]


def start_training(optimizer: Any) -> None:
    """Switch it to the weights that are trained."""
    for each in _with_modes(optimizer):
        each.train()


def stop_training(optimizer: Any) -> None:
    """Switch it to the weights to evaluate and save."""
    for each in _with_modes(optimizer):
        each.eval()


@contextlib.contextmanager
def judged(optimizer: Any) -> Iterator[None]:
    """Around an evaluation, or while weights are copied: within the block the model has the weights to evaluate.

    Afterwards it has exactly those from before: converting back and forth would round them, so that how often a run is
    evaluated and saved would change the result.
    """
    if not has_modes(optimizer):
        yield
        return
    trained = [parameter.detach().clone() for parameter in _parameters(optimizer)]
    stop_training(optimizer)
    try:
        yield
    finally:
        start_training(optimizer)
        with torch.no_grad():
            for parameter, before in zip(_parameters(optimizer), trained, strict=True):
                parameter.copy_(before)


def require_rates(optimizer: Optimizer, step: int = 0) -> None:
    """Raise UserError if a learning rate is unusable.

    Args:
        step: that was done last, after which a scheduler may have set it.
    """
    for rate, first in _rates(optimizer):
        # A scheduler that ends at 0 may miss it by a rounding.
        if not (math.isfinite(rate) and rate >= (-1e-6 * first if step else 0)):
            said = f"a learning rate is {rate:.4g}" + (f" after step {step}, by the scheduler" if step else "")
            raise UserError(Problem(f"{said}: it must be a positive number", "optimizer.lr"))


def require_a_rate(optimizer: Optimizer, *, scheduled: bool) -> None:
    """Raise UserError if all learning rates are 0, and no scheduler may change them."""
    rates = _rates(optimizer)
    if not scheduled and rates and not any(rate for rate, _ in rates):
        raise UserError(Problem("the learning rate is 0, and no scheduler raises it", "optimizer.lr"))


def _rates(optimizer: Optimizer) -> list[tuple[float, float]]:
    """Each group's learning rate, and that with which a scheduler began. Waits for the device, if it is a tensor."""
    known = [group for group in optimizer.param_groups if isinstance(group.get("lr"), int | float | Tensor)]
    return [(float(group["lr"]), float(group.get("initial_lr", 0.0))) for group in known]


def refused_without_closure(optimizer: Optimizer, error: Exception) -> UserError | None:
    """The error to raise if an optimizer's `step` refused to be called without a closure; None for other errors."""
    if "closure" not in f"{type(error).__name__} {error}".lower():
        return None
    name = type(optimizer).__name__
    return UserError(
        f"{name}.step needs a closure, but its signature doesn't show it ({error}): give the parameter no "
        "default, `def step(self, closure)`, or the class first_step and second_step"
    )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
