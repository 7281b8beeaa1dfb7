"""A loss with its own parameters or statistics: class centres, proxies, a temperature, task weights.

It stays whole on each rank. Its parameters are trained where the optimizer has them, as in a plain loop, by the
batch's gradient as the model's are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dtrain.errors import Problem, UserError

from ..distributed.world import World
from . import buffers
from .weights import mismatches


class LearnedLoss:
    """A loss's state over the ranks. All ranks take part in making it: they get rank 0's.

    Args:
        loss: keeps nothing where it is no module.
        net: the model, as the optimizer was made of it. Parameters that the loss shares with it are the model's.
    """

    def __init__(self, loss: Any, net: nn.Module, world: World) -> None:
        self.module = loss.to(world.device) if isinstance(loss, nn.Module) else nn.Module()
        self._world = world
        self._models = {id(parameter) for parameter in net.parameters()}
        self._own = {name: p for name, p in self.module.named_parameters() if id(p) not in self._models}
        self._trained: dict[str, nn.Parameter] = {}
        # torch's own losses keep constants, such as class weights.
        self._keeps_buffers = not type(loss).__module__.startswith("torch.nn.")
        if world.world_size > 1:
            for parameter in self._own.values():
                dist.broadcast(_real(parameter.data), src=0)
            self.share_buffers()

    def adopt(self, optimizer: Optimizer, report: Callable[[str], None], *, is_whole: bool) -> None:
        """Train those of its parameters that the optimizer has. No collective.

        Args:
            report: called with parameters that nothing trains.
            is_whole: whether the strategy leaves each rank all of the model and the optimizer.

        Raises:
            UserError: parameters that this strategy can't train, or that belong to no module and could not be saved.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if strangers := len(held - self._models - {id(parameter) for parameter in self._own.values()}):
            message = (
                f"{strangers} of its parameters belong neither to the model nor to the loss: no checkpoint would hold "
                "them, and each rank would train its own; make them parameters of the model"
            )
            raise UserError(Problem(message, "optimizer"))
        trainable = {name: parameter for name, parameter in self._own.items() if parameter.requires_grad}
        self._trained = {name: parameter for name, parameter in trainable.items() if id(parameter) in held}
        if self._trained and not is_whole:
            message = (
                f"its parameters ({_some(self._trained)}) can be trained by ddp only: other strategies shard the model"
            )
            raise UserError(Problem(message, "loss"))
        if left := trainable.keys() - self._trained.keys():
            report(f"the loss's parameters {_some(sorted(left))} are not trained: the optimizer doesn't have them")

    def average_gradients(self) -> None:
        """Make each gradient the mean over the ranks. All ranks take part, where the loss has what is trained."""
        if self._world.world_size == 1 or not self._trained:
            return
        trained = list(self._trained.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in trained]
        device = self._world.device
        unused = torch.tensor([p.grad is None for p in trained], pin_memory=device.type == "cuda")
        unused = unused.to(device, non_blocking=True)  # pinned, so that nobody waits for it
        numbers = [_real(gradient).reshape(-1).double() for gradient in gradients]
        flat = self._world.sum(torch.cat([*numbers, unused.double()]))
        *sums, unused_on = flat.split([*map(len, numbers), len(trained)])
        is_used = [True] * len(trained)
        if any(parameter.grad is None for parameter in trained):
            is_used = (unused_on < self._world.world_size).tolist()
        for parameter, gradient, total, used in zip(trained, gradients, sums, is_used, strict=True):
            mean = _real(gradient)
            mean.copy_((total / self._world.world_size).view_as(mean))
            parameter.grad = gradient if used else None  # none that no rank has used, as in one process

    def share_buffers(self) -> None:
        """Give all ranks rank 0's statistics. All ranks take part, where the loss keeps any."""
        if self.own_buffers():
            buffers.share_buffers(self.module, self._world)

    def state_dict(self) -> dict[str, Any]:
        """What changes in training; empty for most losses."""
        state, kept = self.module.state_dict(), self.own_buffers()
        return {name: value for name, value in state.items() if name in self._trained or name in kept}

    def own_buffers(self) -> buffers.Buffers:
        """What this rank has of the statistics, which the others may have otherwise. No collective."""
        return buffers.buffers_of(self.module) if self._keeps_buffers else {}

    def load_own_buffers(self, values: buffers.Buffers) -> None:
        """Become what `own_buffers` gave. No collective."""
        if values:
            buffers.put_back(self.module, buffers.on_device(values, self._world.device))

    def misfit(self, state: Mapping[str, Any]) -> str | None:
        """Why a state is not one of this loss, if it is not."""
        own, found = buffers.shapes_of(self.module.state_dict()), buffers.shapes_of(state)
        grown = {name: found[name] for name in buffers.buffers_of(self.module) if name in found}
        expected = {name: own[name] for name in {*self._trained, *found} if name in own} | grown
        problems = mismatches(found, expected)
        return f"the state of a different loss: {'; '.join(problems)}" if problems else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` gave."""
        buffers.make_room(self.module, state, self._world.device)
        self.module.load_state_dict(state, strict=False)

    def load(self, weights: Path) -> None:
        """Become what was saved beside these weights of the model.

        Raises:
            UserError: not all that it learns, or the state of another loss.
        """
        path, own = beside(weights), self.module.state_dict()
        state = torch.load(path, map_location=self._world.device, weights_only=True) if path.exists() else {}
        learned = {name for name, parameter in self._own.items() if parameter.requires_grad} | self.own_buffers().keys()
        if lacking := sorted(learned & own.keys() - state.keys()):
            what = "lacks" if path.exists() else "is missing, and with it"
            raise UserError(f"{path} {what} {_some(lacking)} of the loss, learned together with {weights.name}")
        if problem := self.misfit(state):
            raise UserError(f"{path}: {problem}")
        self.load_state_dict(state)


def beside(weights: Path) -> Path:
    """The file of the loss's state, for that of the model's weights."""
    return weights.with_suffix(".loss.pt")


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _some(names: Any) -> str:
    return ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
