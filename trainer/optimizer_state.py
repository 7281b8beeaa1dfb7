"""An optimizer's state with the names of the parameters instead of their numbers.

So it says whose state it is: a checkpoint of another model is recognised, and the order of the parameters is free.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer


def named_state(optimizer: Optimizer, net: nn.Module) -> dict[str, Any]:
    """`optimizer.state_dict()`, in which each parameter is called what `net` calls it."""
    state, names = optimizer.state_dict(), _names(optimizer, net)
    return _renamed(state, dict(enumerate(names)))


def load_named_state(optimizer: Optimizer, net: nn.Module, state: dict[str, Any]) -> None:
    """Become what `named_state` gave."""
    numbers = {name: number for number, name in enumerate(_names(optimizer, net))}
    optimizer.load_state_dict(_renamed(state, numbers))


def parameter_groups(optimizer: Optimizer, net: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group: those in the state of an optimizer that this one can continue."""
    names = iter(_names(optimizer, net))
    return [[next(names) for _ in group["params"]] for group in optimizer.param_groups]


def _names(optimizer: Optimizer, net: nn.Module) -> list[str]:
    known = {id(parameter): name for name, parameter in net.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # A loss may have parameters too, which no module knows.
    return [known.get(id(parameter), f"parameter-{number}") for number, parameter in enumerate(parameters)]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [names[each] for each in group["params"]]} for group in state["param_groups"]]
    # Some optimizers keep more than parameters' states here, under names of their own.
    return {
        **state,
        "state": {names.get(key, key): each for key, each in state["state"].items()},
        "param_groups": groups,
    }
