"""What a loop of the user's own trains and keeps: models, optimizers, and whatever else has a state."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dtrain.errors import UserError

from ..checkpoint.codec import require_data
from ..distributed.torch_private import tree_leaves
from ..model.buffers import shapes_of
from ..model.weights import mismatches
from ..optimization.scheduler import Schedule  # whose state leaves out what is code
from ..strategies.base import Parallel, trainable

# In the paths of a checkpoint's tensors, the part's name and the parameter's.
_OF_PARAMETER = re.compile(r"([^/]+)(?:/held/[^/]+)*(?:/state)?/([^/]+)(?:/[^/]+)?")


class Parts:
    """By the names that the script gives them, the same on all ranks. All ranks take part in making it.

    Args:
        models: those that are wrapped.
        others: optimizers, and objects with state_dict and load_state_dict.

    Raises:
        UserError: something could not be saved.
    """

    def __init__(self, models: Mapping[str, Parallel], others: Mapping[str, Any]) -> None:
        self.models = models
        self.optimizers = {name: each for name, each in others.items() if isinstance(each, Optimizer)}
        self._others = {name: each for name, each in others.items() if name not in self.optimizers}
        if not self.optimizers:
            raise UserError("Ranks.epochs needs the optimizer too, whose state is saved: optimizer=optimizer")
        self._owners = {name: self._owner(name, each) for name, each in self.optimizers.items()}
        for name, each in self.optimizers.items():
            self._owners[name].adopt(each)
        for name, each in self._others.items():
            if not all(hasattr(each, method) for method in ("state_dict", "load_state_dict")):
                kind = type(each).__name__
                raise UserError(f"Ranks.epochs: {name} is a {kind}, without state_dict and load_state_dict to save it")
            require_data(name, each, state := Schedule(each).state_dict())
            if any(isinstance(value, DTensor) for value in tree_leaves(state)):
                raise UserError(f"Ranks.epochs: {name} holds parts of a model that fsdp has cut; use ddp, or Trainer")

    def _owner(self, name: str, optimizer: Optimizer) -> Parallel:
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for model in self.models.values():
            if trained & {id(parameter) for parameter in model.bare.parameters()}:
                return model
        raise UserError(f"Ranks.epochs: {name} trains none of the parameters of {', '.join(self.models)}")

    @property
    def net(self) -> Parallel:
        """The model whose weights are the run's result."""
        return self.models["net"]

    @property
    def learning_rate(self) -> float | Tensor:
        """That of the first optimizer's first group, as it is now."""
        lr: float | Tensor = next(iter(self.optimizers.values())).param_groups[0].get("lr", 0.0)
        return lr.clone() if isinstance(lr, Tensor) else lr

    def kinds(self) -> dict[str, str]:
        """Their classes, by name."""
        models = {name: type(model.bare).__name__ for name, model in self.models.items()}
        return models | {name: type(each).__name__ for name, each in (self.optimizers | self._others).items()}

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all ranks, but for the models' buffers, of which rank 0's count. All ranks take part."""
        state = {name: model.state_dict() for name, model in self.models.items()}
        state |= {name: self._owners[name].optimizer_state(each) for name, each in self.optimizers.items()}
        return state | {name: Schedule(each).state_dict() for name, each in self._others.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` gave. All ranks take part."""
        for name, model in self.models.items():
            model.load_state_dict(state[name])
        for name, each in self.optimizers.items():
            self._owners[name].load_optimizer_state(each, state[name])
        for name, each in self._others.items():
            each.load_state_dict(state[name])

    def trained(self) -> dict[str, list[str]]:
        """The names of the parameters that require a gradient. No collective."""
        return {name: sorted(trainable(model.bare)) for name, model in self.models.items()}

    def train(self, names: Mapping[str, Collection[str]]) -> None:
        """Have these require a gradient, and no others. All ranks take part."""
        for name, model in self.models.items():
            for own, parameter in model.bare.named_parameters():
                parameter.requires_grad_(own in names[name])
            model.follow_trained()

    def room(self, path: str, like: Tensor) -> Tensor | None:
        """Room for this rank's part of a tensor of `state_dict`, where the model is in parts.

        None where it is whole: what is read is kept in the CPU's memory until the script has come to its place.
        """
        if (found := _OF_PARAMETER.fullmatch(path)) is None:
            return None
        part, name = found.groups()
        owner = self.models.get(part) or self._owners.get(part)
        if owner is None or not owner.forwards_together:
            return None
        return owner.room("model" if part in self.models else "optimizer", name, like)

    def own_buffers(self) -> dict[str, Any]:
        """What this rank has of the models' buffers. No collective."""
        return {name: model.own_buffers() for name, model in self.models.items()}

    def load_own_buffers(self, buffers: Mapping[str, Any]) -> None:
        for name, model in self.models.items():
            model.load_own_buffers(buffers[name])

    def misfit(self, kinds: Mapping[str, str], state: Mapping[str, Any]) -> str | None:
        """Why a state is not one of these parts, if it is not. No collective."""
        own = self.kinds()
        if lacking := sorted(own.keys() - kinds.keys()):
            return f"a checkpoint without {', '.join(lacking)}, which this loop has"
        if others := sorted(kinds.keys() - own.keys()):
            return f"a checkpoint with {', '.join(others)}, which Ranks.epochs was not given"
        for name, kind in own.items():
            if kinds[name] != kind:
                return f"a checkpoint with {name} {kinds[name]}, this loop has {kind}"
        for name, model in self.models.items():
            shapes = shapes_of(state[name])
            grown = {buffer: shapes[buffer] for buffer in model.own_buffers() if buffer in shapes}
            if problems := mismatches(shapes, model.shapes() | grown):
                return f"a checkpoint of another model ({name}): {'; '.join(problems)}"
        for name, each in self.optimizers.items():
            if [group["params"] for group in state[name]["param_groups"]] != self._owners[name].parameter_groups(each):
                return f"a checkpoint whose {name} has other parameters, or other groups of them"
        return None
