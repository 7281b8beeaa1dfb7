"""torch's FSDP2: each rank keeps a shard of each parameter, its gradient and its optimizer state.

The model's blocks are gathered one at a time, when they compute.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from dtrain.errors import UserError
from dtrain.schema.sections import Fit, Fsdp

from ..checkpoint.background import Copied, to_cpu
from ..checkpoint.optimizer_state import held
from ..data.batch_tensors import map_tensors
from ..data.indexed import MicroBatch
from ..distributed.torch_private import BATCH_NORMS
from ..distributed.world import World, ensure_group, require_cpu_backend
from ..loss.step import Outcome, Step
from ..model.blocks import of_classes, repeated
from ..model.buffers import copied
from ..model.call_proxy import called_as
from ..model.optimizers import members_of
from ..model.weights import bare_state_dict
from .base import Parallel, Stepping, require_divisible, run_within, shortened, trainable
from .parameter_use import SAME, ParameterUse
from .same_parts import SameParts


class FullySharded(Parallel):
    """A shard of the model on each rank. All ranks take part in making it.

    On ranks other than 0 the model may be on the meta device: the values are rank 0's. No rank's device ever holds
    more of it than its part and one block.

    Args:
        net: its parameters are exchanged for parts of them, see `adopt`.
        dtype: in which blocks are gathered and computed; None for the parameters' own. Gradients are summed in float32.

    Raises:
        UserError: a model that FSDP2 can't shard, or a class to wrap without modules.
    """

    forwards_together = True

    def __init__(
        self, net: nn.Module, world: World, settings: Fsdp, dtype: torch.dtype | None, *, sync_batchnorm: bool = False
    ) -> None:
        super().__init__(net, world, sync_batchnorm=sync_batchnorm)
        if settings.offload and world.device.type == "cpu":
            raise UserError("fsdp.offload moves GPU state to CPU memory, but there is no GPU here")
        if world.world_size > 1 and not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise UserError(
                f"fsdp on several ranks needs a newer torch than {torch.__version__} (2.15 was tried): in this one "
                "ranks that use different parameters would add up each other's; use ddp or deepspeed"
            )
        require_divisible(self.bare)
        blocks = of_classes(self.bare, settings.wrap, "fsdp.wrap") if settings.wrap else repeated(self.bare)
        _require_apart(self.bare, blocks)
        self.cut()
        # By the original parameters, as long as an optimizer has them.
        self._names = WeakIdKeyDictionary({parameter: name for name, parameter in self.bare.named_parameters()})
        ensure_group(world)
        if settings.offload:
            require_cpu_backend("fsdp.offload")
        self._mesh = init_device_mesh(world.device.type, (world.world_size,))
        if any(isinstance(module, BATCH_NORMS) for module in self.bare.modules()):
            dtype = None  # torch's batch norm has its statistics and its parameters in one type
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        offload = CPUOffloadPolicy() if settings.offload else OffloadPolicy()
        self.module = Stepping(self.bare)
        if dtype is not None:  # FSDP2 casts what blocks are given, and of its root's arguments knows only a step
            self.bare.register_forward_pre_hook(functools.partial(_cast, dtype), with_kwargs=True)
        for block in [*reversed(blocks), self.module]:
            self._fill(block)
            fully_shard(
                block,
                mesh=self._mesh,
                # The root's own are needed first in the backward pass: they stay.
                reshard_after_forward=settings.reshard_after_forward and block is not self.module,
                mp_policy=policy,
                offload_policy=offload,
            )
        for module in self.bare.modules():
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                setattr(module, name, _real(buffer, world.device))
        self.share_buffers()
        gathered = [] if world.world_size == 1 else blocks
        self._same_blocks = SameParts(world, {path: m for path, m in self.bare.named_modules() if m in gathered}, SAME)
        self._trainable = trainable(self.bare)  # the whole ones are not kept
        self._use = ParameterUse(self.bare, self.module, world)

    def _fill(self, block: nn.Module) -> None:
        """Bring the block's parameters to the device, with rank 0's values. All ranks take part."""
        made: dict[nn.Parameter, nn.Parameter] = {}  # those that are shared stay shared
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                if not isinstance(parameter, DTensor):  # of a block within
                    filled = nn.Parameter(_real(parameter.detach(), self.world.device), parameter.requires_grad)
                    setattr(module, name, made.setdefault(parameter, filled))
        for parameter in made.values():
            dist.broadcast(parameter.data, src=0)

    def adopt(self, optimizer: Optimizer | None) -> None:
        for each in members_of(optimizer):
            if each is not None:
                self._adopt(each)
        if optimizer is not None:
            self._use.watch()

    def _adopt(self, optimizer: Optimizer) -> None:
        if isinstance(optimizer, LBFGS):
            raise UserError("LBFGS needs all parameters as one vector, but fsdp leaves each rank a shard: use ddp")
        if type(optimizer).__name__ == "Adafactor":
            raise UserError("torch's Adafactor can't work on sharded parameters: use ddp")
        if any(each.param_groups is not optimizer.param_groups for each in held(optimizer).values()):
            name = type(optimizer).__name__
            raise UserError(f"{name} holds an optimizer with parameter groups of its own: share them, or use ddp")
        parts = dict(self.bare.named_parameters())
        for parameter, state in list(optimizer.state.items()):  # some have it before their first step
            if (name := self._names.get(parameter)) is not None:
                del optimizer.state[parameter]
                optimizer.state[parts[name]] = {key: self._part_of(value, parts[name]) for key, value in state.items()}
        for group in optimizer.param_groups:
            names = [self._names.get(parameter) for parameter in group["params"]]
            whole = zip(names, group["params"], strict=True)
            group["params"] = [parameter if name is None else parts[name] for name, parameter in whole]

    def follow_trained(self) -> None:
        now = trainable(self.bare)  # FSDP2 has whole parameters require gradients as their parts do
        if now.keys() != self._trainable.keys():
            self._trainable = now
            self._use.begin()
            self._use.watch()

    def called(self) -> nn.Module:
        """Its parameters are parts whenever no forward or backward pass is under way, so that it may be changed then.

        The root's own are gathered once more for the backward pass: no step trains on what stayed from before it.
        """
        assert isinstance(self.module, FSDPModule)
        if self._names:
            gc.collect()  # an optimizer in a circle with its scheduler is no more
        if self._names:
            raise UserError(
                "fsdp exchanges the model's parameters for parts of them, and something was made of the former ones "
                f"({shortened(sorted(self._names.values()))}): make the optimizer of the wrapped model's parameters"
            )
        self.module.set_reshard_after_forward(True, recurse=False)
        self._use.watch()
        return called_as(self.bare, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(lambda net: net(*args, **kwargs))

    def expect_backward(self, loss: Tensor) -> None:
        if isinstance(loss, DTensor):
            raise UserError("the loss is computed from parameters outside of the model's call, where fsdp has cut them")

    def end_batch(self, losses: Sequence[Tensor]) -> None:
        self._use.require_all_or_none(self._trainable.keys())

    def require_averaged(self, loss: Tensor, step: int) -> None:
        self._same_blocks.end_backward(step)
        parts = dict(self.bare.named_parameters())
        for name in self._use.take_unused(self._trainable.keys(), step):  # as in one process, it has no gradient
            parts[name].grad = None

    def _part_of(self, value: Any, part: nn.Parameter) -> Any:
        """Of a state that has its parameter's shape, what belongs to this rank's part. All ranks take part."""
        if not isinstance(value, Tensor) or value.shape != part.shape:
            return value
        whole = _real(value, self.world.device)
        dist.broadcast(whole, src=0)
        mine: Any = torch.empty_like(part.detach(), dtype=whole.dtype)
        return mine.copy_(distribute_tensor(whole, self._mesh, mine.placements, src_data_rank=None))

    def divide(self, optimizers: Sequence[Optimizer]) -> None:
        self._use.begin()
        self._same_blocks.begin_fit(has_several=bool(optimizers))

    def expect(self, loss: Tensor, optimizer: Optimizer, place: int) -> Tensor:
        self._use.place = place
        return loss

    def backward(self, loss: Tensor, optimizer: Optimizer | None = None) -> None:
        loss.backward()  # of gathered parameters, which no optimizer has

    def run(self, step: Step, micro_batch: MicroBatch) -> Outcome:
        with self._same_blocks.required():
            return run_within(self.module, step, micro_batch)

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        yield

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        with super().evaluating():
            yield
        self._reshard()

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        with super().trying():
            yield
        self._reshard()

    def pass_over(self) -> None:
        self._reshard()

    def _reshard(self) -> None:
        """Cut the root again, which without a backward pass stays gathered, with the parameters that it had."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def weights(self, instead: Mapping[int, Tensor] | None = None) -> dict[str, Any]:
        whole = Copied()
        for name, kept in bare_state_dict(self.bare, instead).items():
            if not isinstance(kept, Tensor):
                whole[name] = map_tensors(to_cpu, copied(kept))
                continue
            value: Any = kept.to(self.world.device)
            gathered = value.full_tensor() if isinstance(value, DTensor) else value
            if self.world.is_main:
                whole[name] = to_cpu(gathered)
        return whole

    def room(self, section: str, name: str, like: Tensor) -> Tensor | None:
        part = dict(self.bare.named_parameters(remove_duplicate=False)).get(name)
        return None if part is None or part.shape != like.shape else torch.empty_like(part.detach(), dtype=like.dtype)


def _cast(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The arguments of a forward pass, its floating-point numbers of this type."""
    return map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, (args, kwargs))


def _real(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on that device; its values are undefined where it was on the meta device."""
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)


def _require_apart(net: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Raise UserError where two blocks share a parameter: each would gather a copy of its own."""
    block_of: dict[nn.Module, nn.Module] = {}
    for block in [net, *blocks]:  # inner ones last
        block_of |= dict.fromkeys(block.modules(), block)
    users: dict[int, tuple[str, nn.Module]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{own}" if path else own
            first, block = users.setdefault(id(parameter), (name, block_of[module]))
            if block is not block_of[module]:
                raise UserError(
                    f"fsdp.wrap: {first} and {name} are one parameter, used in two blocks ({type(block).__name__} and "
                    f"{type(block_of[module]).__name__}); name classes of modules that share nothing"
                )


def parallel(net: nn.Module, world: World, settings: Fsdp | None, fit: Fit, dtype: torch.dtype | None) -> FullySharded:
    """A model cut into the ranks' parts, computed in `dtype`. All ranks take part."""
    return FullySharded(net, world, settings or Fsdp(), dtype, sync_batchnorm=fit.sync_batchnorm)
