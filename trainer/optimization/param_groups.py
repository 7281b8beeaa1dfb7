"""Which optimizer trains which parameters, and in which of its groups: by patterns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.errors import Problem, UserError
from dtrain.schema.targets import Group, NamedOptimizer

from ..model.patterns import match, require_matches


@dataclass(frozen=True)
class Named:
    """A parameter, with what it may be called in a pattern: `blocks.0.norm.weight`, and `LayerNorm.weight`."""

    parameter: nn.Parameter
    names: tuple[str, str]


def named_parameters(net: nn.Module, loss: Any = None) -> list[Named]:
    """The model's parameters, each once, and the loss's where it is a module that learns, called `loss.centres`."""
    modules = [*net.named_modules(), *(loss.named_modules(prefix="loss") if isinstance(loss, nn.Module) else ())]
    found: dict[int, Named] = {}
    for path, module in modules:
        for own, parameter in module.named_parameters(recurse=False):
            names = f"{path}.{own}" if path else own, f"{type(module).__name__}.{own}"
            found.setdefault(id(parameter), Named(parameter, names))  # which two modules may share
    return list(found.values())


def shared_out(parameters: Sequence[Named], optimizers: Mapping[str, NamedOptimizer]) -> dict[str, list[Named]]:
    """The parameters that each of several optimizers trains.

    Raises:
        UserError: a pattern that matches nothing, an optimizer without parameters, or a parameter that two optimizers
            would train, or none.
    """
    known = [name for each in parameters for name in each.names]
    for name, optimizer in optimizers.items():
        require_matches(optimizer.params, known, f"optimizer.{name}.params")
    rest = next((name for name, optimizer in optimizers.items() if not optimizer.params), None)
    shares: dict[str, list[Named]] = {name: [] for name in optimizers}
    for each in parameters:
        owners = [name for name, optimizer in optimizers.items() if match(each.names, optimizer.params)]
        if len(owners) > 1:
            message = f"{each.names[0]} is trained by {owners[0]} too: its patterns match it as well"
            raise UserError(Problem(message, f"optimizer.{owners[1]}.params"))
        if owners or rest is not None:
            shares[owners[0] if owners else str(rest)].append(each)
        elif each.parameter.requires_grad:
            message = f"none of them trains {each.names[0]}"
            hint = "give it to one of them, or freeze it (fit.freeze); an optimizer without params trains the rest"
            raise UserError(Problem(message, "optimizer", hint=hint))
    for name, share in shares.items():
        if not share:
            raise UserError(
                Problem("there is nothing left for it to train: the others have it all", f"optimizer.{name}")
            )
    return shares


def grouped(parameters: Sequence[Named], groups: Sequence[Group], rate: Any, path: str) -> list[dict[str, Any]]:
    """What an optimizer takes as its first argument: the groups in their order, then those in no group.

    The first group that has a match takes a parameter.

    Args:
        rate: the optimizer's own learning rate, of which `lr_factor` makes a group's.
        path: of the optimizer in job.yaml.

    Raises:
        UserError: a pattern that matches nothing.
    """
    require_matches(
        [pattern for group in groups for pattern in group.params],
        [name for each in parameters for name in each.names],
        f"{path}.groups",
    )
    members: list[list[nn.Parameter]] = [[] for _ in range(len(groups) + 1)]
    for each in parameters:
        matching = (number for number, group in enumerate(groups) if match(each.names, group.params))
        members[next(matching, len(groups))].append(each.parameter)
    settings = [
        (group.model_extra or {}) | ({} if group.lr_factor is None else {"lr": group.lr_factor * rate})
        for group in groups
    ]
    made = [{**setting, "params": each} for setting, each in zip([*settings, {}], members, strict=True)]
    return [group for group in made if group["params"]]


@contextlib.contextmanager
def rates_apart(optimizer: Optimizer, path: str) -> Iterator[None]:
    """Around making a scheduler: groups that have learning rates of their own keep them apart.

    Raises:
        UserError: the scheduler gives all of them one, as OneCycleLR does with its max_lr.
    """
    before = {float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None}
    yield
    after = {float(group["lr"]) for group in optimizer.param_groups if group.get("lr") is not None}
    if len(before) > 1 and len(after) == 1 and after != {0.0}:  # a warm-up may begin with 0
        message = f"gives all parameter groups one learning rate ({after.pop():.4g}) in place of their own"
        raise UserError(Problem(message, path, hint="give it a list, one rate for each group"))
