"""The whole model on every rank, with averaged gradients: torch's DistributedDataParallel, made exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from dtrain.errors import UserError
from dtrain.schema.sections import Fit

from ..checkpoint.optimizer_state import to_parameters
from ..data.indexed import MicroBatch
from ..distributed.torch_private import require_reduced
from ..distributed.torch_versions import BUFFERS_APART
from ..distributed.world import World
from ..loss.step import Outcome, Step
from ..model.buffers import share_buffers
from ..model.call_proxy import called_as
from .base import (
    Parallel,
    Stepping,
    has_sparse_gradients,
    matches,
    reached_leaves,
    require_all_used,
    run_within,
    trainable,
)

_ALLOW = ", or allow it: fit.unused_parameters: allow"


class DataParallel(Parallel):
    """The whole model on each rank. All ranks take part in making it.

    Args:
        allows_unused: whether steps may leave out parameters, each step others; DDP then looks for them.
    """

    def __init__(
        self, net: nn.Module, world: World, *, sync_batchnorm: bool = False, allows_unused: bool = False
    ) -> None:
        super().__init__(net, world, sync_batchnorm=sync_batchnorm)
        self._allows_unused = allows_unused
        self.bare.to(world.device)
        self._stepping = Stepping(self.bare)
        self._is_synchronised = False
        self._shared_out: list[Optimizer] = []  # those that get gradients of their own; none: they are one's, or all's
        self._averaging: dict[int, Averaging] = {}  # by the ids of these, what averages their parameters' gradients
        self._expected: Averaging | None = None  # of them, the one that the last backward pass was for
        self._wrap()

    def adopt(self, optimizer: Optimizer | None) -> None:
        if optimizer is not None:
            to_parameters(optimizer)

    def follow_trained(self) -> None:
        before, now = self._trainable.values(), trainable(self.bare).values()
        if list(map(id, before)) != list(map(id, now)):
            self._wrap()

    def _wrap(self) -> None:
        """Have DDP average the gradients of what is trained now, and of nothing else."""
        self.module, self._expected = self.bare, None
        self._averaging.clear()  # what was there releases the parameters
        self._trainable = trainable(self.bare)
        if self.world.world_size == 1 or not self._trainable:
            return
        if not self._is_synchronised:
            share_buffers(self.bare, self.world)
        if self._shared_out:
            own = set(map(id, self.bare.parameters()))
            for optimizer in self._shared_out:
                if share := [parameter for parameter in self.trained(optimizer) if id(parameter) in own]:
                    self._averaging[id(optimizer)] = self._averaged(nn.ParameterList(share))
        else:
            self.module = self._averaged(self.bare)
        self._is_synchronised = True

    def _averaged(self, module: nn.Module) -> Averaging:
        """What averages the gradients of a module's parameters."""
        device = self.world.device
        wrapped = Averaging(
            module,
            device_ids=[device.index] if device.type == "cuda" else None,
            **BUFFERS_APART,  # batch norm's are each rank's own until they are shared again
            init_sync=not self._is_synchronised,  # later ones must leave each rank its own
            gradient_as_bucket_view=True,
            find_unused_parameters=self._allows_unused,
        )
        if not has_sparse_gradients(self.bare):  # those travel by themselves, in no bucket with others
            settle_buckets(wrapped)
        return wrapped

    def divide(self, optimizers: Sequence[Optimizer]) -> None:
        if list(map(id, optimizers)) != list(map(id, self._shared_out)):
            self._shared_out = list(optimizers)
            self._wrap()

    def expect(self, loss: Tensor, optimizer: Optimizer, place: int) -> Tensor:
        self._expected = self._averaging.get(id(optimizer))
        if self._expected is None:  # on a rank that is alone
            return loss
        with _wrapping(self._expected, self._stepping):
            expected: Tensor = self._expected(lambda net: loss)
        return expected

    def called(self) -> nn.Module:
        """On one process it is the model itself."""
        return self.bare if self.module is self.bare else called_as(self.bare, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def run(self, step: Step, micro_batch: MicroBatch) -> Outcome:
        if not isinstance(self.module, Averaging):
            return super().run(step, micro_batch)
        with _wrapping(self.module, self._stepping):
            return run_within(self.module, step, micro_batch)

    def room(self, section: str, name: str, like: Tensor) -> Tensor | None:
        try:
            parameter = self.bare.get_parameter(name)
        except AttributeError:
            return None
        if is_lazy(parameter) or parameter.shape != like.shape or not like.dim():  # a step count is the CPU's
            return None
        if section == "optimizer":
            return torch.empty_like(like, device=parameter.device)
        return parameter.detach() if matches(parameter, like) else None

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self.module, Averaging):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def require_all_used(self, loss: Tensor, optimizer: Optimizer) -> None:
        reached, own = reached_leaves(loss), set(map(id, self.bare.parameters()))
        trained = {id(parameter) for parameter in self.trained(optimizer)}
        trained = trained & own or trained  # it may be the loss alone that is trained
        if reached is not None and reached.isdisjoint(trained):
            raise UserError(
                f"the loss depends on none of the model's parameters that this {type(optimizer).__name__} trains: "
                "something was detached on the way to it, or the optimizer has other parameters; nothing is learned"
            )
        if self.world.world_size > 1 and not self._allows_unused:
            # DDP waits for every parameter's gradient. Checked now: the backward pass would hang.
            require_all_used(self._awaited(optimizer), loss, mend=_ALLOW)

    def require_averaged(self, loss: torch.Tensor, step: int) -> None:
        averaging = self.module if isinstance(self.module, Averaging) else self._expected
        if averaging is None:
            return
        try:
            require_reduced(averaging)
        except RuntimeError:
            awaited = {id(parameter) for parameter in averaging.module.parameters()}
            named = {name: each for name, each in self._trainable.items() if id(each) in awaited}
            require_all_used(named, loss, f" of step {step}", _ALLOW)
            raise

    def _awaited(self, optimizer: Optimizer) -> dict[str, nn.Parameter]:
        """The parameters whose gradients are averaged when this optimizer is to learn."""
        own = set(map(id, self.trained(optimizer)))
        is_apart = bool(self._shared_out)
        return {name: each for name, each in self._trainable.items() if id(each) in own or not is_apart}

    def expect_backward(self, loss: Tensor) -> None:
        """DDP is ready for one after its own forward pass. A loop may have called methods of the model instead."""
        if not isinstance(self.module, Averaging):
            return
        if not self.module.was_called and torch.is_grad_enabled() and self._is_behind(loss):
            with _wrapping(self.module, self._stepping):
                self.module(lambda net: torch.zeros(()))
        self.module.was_called = False

    def end_batch(self, losses: Sequence[Tensor]) -> None:
        if not isinstance(self.module, Averaging):
            return
        try:
            require_reduced(self.module)
        except RuntimeError:
            if losses:
                require_all_used(self._trainable, torch.stack([each.sum() for each in losses]).sum(), " of the batch")
            raise

    def _is_behind(self, loss: Tensor) -> bool:
        reached = reached_leaves(loss)
        return reached is None or any(id(parameter) in reached for parameter in self.bare.parameters())


class Averaging(DistributedDataParallel):
    """DDP that knows whether its forward pass has made it ready for a backward pass."""

    was_called = False  # since it was last looked at

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.was_called = True
        return super().forward(*args, **kwargs)  # type: ignore[no-untyped-call]


def settle_buckets(wrapped: Averaging) -> None:
    """Make DDP group its gradients now, finally and always in the same way. All ranks take part, in a sum of zeros.

    DDP regroups its buckets after the first backward pass of a process, in the order in which the gradients came.
    A sum over three ranks or more depends on the grouping, so that the first step after a resume would add the
    same numbers in another order than the uninterrupted run did. Here the first pass is one through each
    parameter in turn, before any of the model's own: the grouping follows from the model alone.
    """
    with _wrapping(wrapped, _TouchAll(wrapped.module)):
        for _ in range(2):  # the second forward regroups
            wrapped().backward()
    wrapped.zero_grad()
    wrapped.was_called = False


@contextlib.contextmanager
def _wrapping(wrapped: DistributedDataParallel, other: nn.Module) -> Iterator[None]:
    """In the block, DDP calls another module of the same parameters."""
    net = wrapped.module
    wrapped.module = other
    try:
        yield
    finally:
        wrapped.module = net


class _TouchAll(nn.Module):
    """Zero, as a sum over the parameters: its backward pass reaches them last to first, as a model's mostly does."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.touched = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def forward(self) -> torch.Tensor:
        zero = torch.zeros((), device=self.touched[0].device)
        for parameter in self.touched:
            total = parameter.sum() * 0
            zero = zero + (total.real if total.is_complex() else total)
        return zero


def parallel(net: nn.Module, world: World, settings: None, fit: Fit, dtype: torch.dtype | None) -> DataParallel:
    """A model whole on each rank. All ranks take part. Its parameters stay float32, whatever `dtype` it computes in."""
    is_allowed = fit.unused_parameters == "allow"
    return DataParallel(net, world, sync_batchnorm=fit.sync_batchnorm, allows_unused=is_allowed)
