"""An optimizer's state with the names of the parameters instead of their numbers.

So each state names its parameter: a checkpoint of another model is recognised, and the order of parameters is free.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dtrain.errors import UserError

from ..data.batch_tensors import map_tensors
from ..model.optimizers import Optimizers, members_of

_HELD = "held"  # in a state, the key of those of the optimizers that it holds


def named_state(optimizer: Optimizer, net: nn.Module) -> dict[str, Any]:
    """`optimizer.state_dict()`, in which each parameter is called what `net` calls it."""
    if isinstance(optimizer, Optimizers):
        members = {name: named_state(each, net) for name, each in optimizer.members.items()}
        groups = [group for each in members.values() for group in each["param_groups"]]
        return {"state": {}, "param_groups": groups, _HELD: members}
    state, names = optimizer.state_dict(), _names(optimizer, net)
    _require_torchs(optimizer, state)
    named = _renamed(state, dict(enumerate(names)))
    if inner := held(optimizer):
        named[_HELD] = {attribute: named_state(each, net) for attribute, each in inner.items()}
    return named


def load_named_state(optimizer: Optimizer, net: nn.Module, state: dict[str, Any]) -> None:
    """Become what `named_state` gave."""
    if isinstance(optimizer, Optimizers):
        for name, each in optimizer.members.items():
            load_named_state(each, net, state[_HELD][name])
        return
    inner = {name: (each, each.param_groups is optimizer.param_groups) for name, each in held(optimizer).items()}
    numbers = {name: number for number, name in enumerate(_names(optimizer, net))}
    optimizer.load_state_dict(_renamed({key: value for key, value in state.items() if key != _HELD}, numbers))
    for attribute, (each, shares_groups) in inner.items():
        load_named_state(each, net, state[_HELD][attribute])
        if shares_groups:
            each.param_groups = optimizer.param_groups


def held(optimizer: Any) -> dict[str, Optimizer]:
    """The optimizers that an optimizer delegates its steps to, by its attribute: a sharpness-aware one, a lookahead.

    Their states are saved besides its own, which often leaves them out.
    """
    return {name: value for name, value in vars(optimizer).items() if isinstance(value, Optimizer)}


def to_parameters(optimizer: Optimizer) -> None:
    """Move an optimizer's state to the device of its parameters, if these have moved since.

    Some have it before their first step, Adagrad for one; others have trained before.
    """
    for each in (part for member in members_of(optimizer) for part in (member, *held(member).values())):
        for group in each.param_groups:
            counts_there = group.get("fused") or group.get("capturable")  # else torch counts steps on the CPU
            for parameter in group["params"]:
                state = getattr(each, "state", {}).get(parameter)  # one that wraps another may have none
                if isinstance(state, dict):
                    move = operator.methodcaller("to", parameter.device)
                    state |= {key: map_tensors(move, state[key]) for key in state if key != "step" or counts_there}


def parameter_groups(optimizer: Optimizer, net: nn.Module) -> list[list[str]]:
    """The names of the parameters of each group, by which a state is recognised as this optimizer's."""
    names = iter(_names(optimizer, net))
    return [[next(names) for _ in group["params"]] for group in optimizer.param_groups]


def _require_torchs(optimizer: Any, state: Any) -> None:
    """Raise UserError for a state_dict that is not structured like torch's."""
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        raise UserError(
            f"{type(optimizer).__name__}.state_dict() lacks state and param_groups, which torch's optimizers have: "
            "a checkpoint could not assign its state to parameters"
        )


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
