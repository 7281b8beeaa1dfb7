"""Several optimizers of one model, each with parameters of its own, where one is expected."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch.optim import Optimizer


class Optimizers(Optimizer):
    """Optimizers by name. Together they make one step; a step that yields its losses has each make its own.

    Its state is theirs: `param_groups` and `state` show what the members have at that moment.
    """

    def __init__(self, members: Mapping[str, Optimizer]) -> None:
        self.members = dict(members)  # and not Optimizer.__init__, which would keep groups beside theirs

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]  # an attribute of torch's
        """The members' groups, one member after the other."""
        return [group for each in self.members.values() for group in each.param_groups]

    @property
    def state(self) -> MutableMapping[Any, Any]:  # type: ignore[override]  # an attribute of torch's
        """The members' states, to be read."""
        return ChainMap(*(each.state for each in self.members.values()))

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # those that need one are refused
        for each in self.members.values():
            each.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for each in self.members.values():
            each.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: each.state_dict() for name, each in self.members.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for name, each in self.members.items():
            each.load_state_dict(state_dict[name])


def members_of(optimizer: Any) -> list[Any]:
    """The optimizers that an optimizer stands for: itself, unless it is several."""
    return list(optimizer.members.values()) if isinstance(optimizer, Optimizers) else [optimizer]


def kind_of(optimizer: Any) -> str:
    """What it is called where its class is meant."""
    if not isinstance(optimizer, Optimizers):
        return type(optimizer).__name__
    return ", ".join(f"{name}: {type(each).__name__}" for name, each in optimizer.members.items())
