"""DeepSpeed's ZeRO: shards the optimizer state (stage 1), the gradients too (2), the parameters too (3).

Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, SC 2020. Here are the places
where DeepSpeed's engine meets the loop, and how its flat parts become whole tensors by name, and back.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pydantic
import torch
import torch.distributed as dist
import torch.distributed.tensor as dtensor
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from dtrain.errors import Problem, UserError, first_line
from dtrain.schema import deepspeed_config
from dtrain.schema.packages import require
from dtrain.schema.sections import Fit

from ..checkpoint.background import Copied, to_cpu
from ..checkpoint.optimizer_state import held, parameter_groups
from ..checks.optimizer_kinds import has_modes, needs_closure
from ..data.indexed import MicroBatch
from ..distributed.world import World, ensure_group, require_cpu_backend
from ..loss.step import Outcome, Step
from ..model.buffers import extra_states
from ..model.optimizers import Optimizers
from ..model.weights import bare_tensors
from .base import Parallel, Stepping, require_all_used, require_divisible, run_within, shortened, trainable
from .deepspeed_private import Fragment, ZeroOptimizer, is_cut, leave_out_shm, whole_shape
from .same_parts import SameParts

# Their steps look at a parameter's rows and columns, or at all parameters at once; ZeRO gives them a flat part.
_NOT_BY_NUMBER = ("Adafactor", "LBFGS", "Muon", "SparseAdam")
_SAME = (
    "DeepSpeed would take zeros for gradients, and decay the weights: use all that is trained in each step, on all "
    "ranks, or ddp with fit.unused_parameters: allow"
)


def parallel(
    net: nn.Module, world: World, settings: Mapping[str, Any] | None, fit: Fit, dtype: torch.dtype | None
) -> Parallel:
    """A model that DeepSpeed trains, with the stage that its settings ask for and errors as of `DeepSpeedStage0`.

    All ranks take part. DeepSpeed knows `dtype` by `fit`.
    """
    config = settings or {}
    kind = DeepSpeedZero if deepspeed_config.stage(config) else DeepSpeedStage0
    return kind(net, world, config, fit)


class DeepSpeedStage0(Parallel):
    """A model that DeepSpeed trains, whole on each rank: stage 0. All ranks take part in `adopt`.

    Args:
        config: DeepSpeed's own settings.
        fit: what the job says already, with which they must agree.

    Raises:
        UserError: settings that DeepSpeed or the job doesn't agree with, or a model that can't be cut.
    """

    def __init__(
        self,
        net: nn.Module,
        world: World,
        config: Mapping[str, Any],
        fit: Fit,
    ) -> None:
        super().__init__(net, world, sync_batchnorm=fit.sync_batchnorm)
        if problems := list(deepspeed_config.disagreements(config, fit)):
            raise UserError(problems)
        require_divisible(self.bare)
        if others := list(extra_states(self.bare)):
            raise UserError(f"{others[0]} (get_extra_state) can't be saved by DeepSpeed: use ddp, or fsdp")
        self._config = deepspeed_config.filled(config, fit.precision)
        self._stage = deepspeed_config.stage(config)
        self._engine: Any = None
        self._used: set[str] = set()  # parameters that this batch has given a gradient
        self._groups: list[list[str]] = []  # the names of the optimizer's parameters, before the engine exchanges them
        ensure_group(world)
        require_cpu_backend("DeepSpeed")

    def adopt(self, optimizer: Optimizer | None) -> None:
        if optimizer is None:
            self.bare.to(self.world.device)
            for parameter in self.bare.parameters():
                dist.broadcast(parameter.data, src=0)
            return
        if isinstance(optimizer, Optimizers):
            raise UserError(Problem("DeepSpeed trains with one optimizer; several need ddp or fsdp", "optimizer"))
        name = type(optimizer).__name__
        if name != "LBFGS" and (needs_closure(optimizer) or has_modes(optimizer) or held(optimizer)):
            wants = "needs a closure, or train() and eval(), or delegates its steps to another optimizer"
            raise UserError(f"{name} {wants}, which DeepSpeed does not support: use ddp")
        if name in _NOT_BY_NUMBER:
            raise UserError(f"{name} needs whole parameters, but ZeRO gives it flattened shards: use ddp")
        self._groups, known = parameter_groups(optimizer, self.bare), dict(self.bare.named_parameters())
        if unknown := [name for group in self._groups for name in group if name not in known]:
            raise UserError(f"the optimizer has parameters that are not the model's ({len(unknown)}): use ddp, or fsdp")
        deepspeed = _deepspeed(self.world.device)
        self.cut()
        try:
            self._bring(deepspeed)
            self._engine, *_ = deepspeed.initialize(model=Stepping(self.bare), optimizer=optimizer, config=self._config)
        except pydantic.ValidationError as error:
            raise UserError([_problem(each) for each in error.errors()]) from None
        except (AssertionError, ValueError) as error:  # how it says that settings contradict each other
            raise UserError(Problem(first_line(error), "deepspeed")) from None
        self.module = self._engine
        self.share_buffers()  # it has shared the parameters itself
        self._watch_use()

    def _bring(self, deepspeed: Any) -> None:
        """Bring the model to the device before the engine is made, where that is not left to it."""

    def _watch_use(self) -> None:
        """See which modules are used, before the ranks sum their gradients, and which parameters get one."""
        for name, parameter in trainable(self.bare).items():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._used.add(name))
        is_alone = self.world.world_size == 1
        with_own = {name: each for name, each in self.bare.named_modules() if any(True for _ in each.parameters(False))}
        self._same_modules = SameParts(self.world, {} if is_alone else with_own, _SAME)

    # -- a step ----------------------------------------------------------------------------------

    def run(self, step: Step, micro_batch: MicroBatch) -> Outcome:
        if self._engine is None:
            return super().run(step, micro_batch)
        with self._same_modules.required():
            return run_within(self._engine, step, micro_batch)

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def require_all_used(self, loss: Tensor, optimizer: Optimizer) -> None:
        require_all_used(trainable(self.bare), loss)  # it would take zeros for gradients, and decay the weights

    def divide(self, optimizers: Sequence[Optimizer]) -> None:
        super().divide(optimizers)
        self._same_modules.begin_fit()

    def require_averaged(self, loss: Tensor, step: int) -> None:
        unused = [name for name in trainable(self.bare) if name not in self._used]
        self._used.clear()
        if unused:
            raise UserError(f"the loss of step {step} does not depend on the parameters {shortened(unused)}. {_SAME}")

    def backward(self, loss: Tensor, optimizer: Optimizer | None = None) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def zero_grad(self, optimizer: Optimizer) -> None:
        """Do nothing: DeepSpeed drops gradients after its step."""

    def step(self, optimizer: Optimizer) -> bool:
        self._engine.step()
        return bool(self._engine.was_step_applied())

    def drop_gradients(self) -> None:
        self._engine.zero_grad()

    def own_optimizer_state(self, optimizer: Optimizer) -> Any:
        return list(optimizer.state.values())  # whose keys are no parameters of the model any more

    def parameter_groups(self, optimizer: Optimizer) -> list[list[str]]:
        return self._groups


class DeepSpeedZero(DeepSpeedStage0):
    """A model that DeepSpeed shards for training: ZeRO's stages 1 to 3."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group_of: dict[str, int] = {}
        self._parameters = dict(self.bare.named_parameters(remove_duplicate=False))
        self._fragments: dict[nn.Parameter, Fragment] = {}
        self._mesh = init_device_mesh("cpu", (self.world.world_size,))  # of what a checkpoint has in parts
        self.forwards_together = self._stage == 3

    def adopt(self, optimizer: Optimizer | None) -> None:
        super().adopt(optimizer)
        if optimizer is None:
            return
        self._zero = ZeroOptimizer(self._engine, self._stage)
        if self._zero.optimizer is not optimizer:
            name = type(optimizer).__name__
            raise UserError(f"DeepSpeed replaces {name} with its own, without its groups: use ddp, or fsdp")
        self._group_of = {name: number for number, group in enumerate(self._groups) for name in group}
        parameters = [parameter for _, parameter in self._trained()]
        self._fragments = dict(self._zero.fragments(parameters, self.world.rank))

    def _bring(self, deepspeed: Any) -> None:
        if self._stage == 3:  # a parameter at a time: the device never holds the whole model
            deepspeed.zero.Init(module=self.bare, config_dict_or_path=self._config)
            for buffer in self.bare.buffers():
                buffer.data = buffer.data.to(self.world.device)

    # -- a step ----------------------------------------------------------------------------------

    def trained(self, optimizer: Optimizer) -> list[Tensor]:
        return list({id(fragment.flat): fragment.flat for fragment in self._fragments.values()}.values())

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        if self._zero.is_offloaded:
            self.world.await_device()  # for the gradients to have come to the CPU's memory: not all of them have
            return [flat.grad for flat in self.trained(optimizer) if flat.grad is not None]
        return self._zero.gradients()

    def norm(self, gradients: list[Tensor]) -> Tensor:
        own = super().norm(gradients)
        return self.world.sum(own.to(self.world.device).square()).sqrt()

    def drop_gradients(self) -> None:
        self._engine.step()  # which leaves out what is not finite, and is the only one who can drop it

    # -- what is saved ---------------------------------------------------------------------------

    def weights(self, instead: Mapping[int, Tensor] | None = None) -> dict[str, Tensor]:
        if self._stage < 3 or self._engine is None:
            return super().weights(instead)
        whole = Copied()
        for name, value in bare_tensors(self.bare).items():
            with self._whole(value) as gathered:
                if self.world.is_main:
                    whole[name] = to_cpu(gathered.detach())
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        if self._stage < 3:
            return super().state_dict()
        state = {}
        for name, value in self.bare.state_dict(keep_vars=True).items():
            with self._whole(value) as gathered:
                is_parameter = isinstance(value, nn.Parameter)
                state[name] = self._part_of(gathered.detach()) if is_parameter else gathered
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._stage < 3:
            super().load_state_dict(state)
        else:
            for name, value in self.bare.state_dict(keep_vars=True).items():
                whole = _full(state[name])
                with self._whole(value, modified=True) as gathered, torch.no_grad():
                    gathered.copy_(whole)
        self._zero.take_weights()

    def shapes(self) -> dict[str, torch.Size]:
        return {name: whole_shape(value) for name, value in self.bare.state_dict(keep_vars=True).items()}

    @contextlib.contextmanager
    def _whole(self, value: Tensor, *, modified: bool = False) -> Iterator[Tensor]:
        """The tensor with its values, gathered where ranks have parts. All ranks take part."""
        if not is_cut(value):
            yield value
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([value], modifier_rank=0 if modified else None):
            yield value

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, dict[str, Any]] = {}
        for name, parameter in self._trained():
            fragment = self._fragments[parameter]
            found = optimizer.state.get(fragment.flat, {})
            state |= {name: {}} if found else {}
            for key, value in found.items():
                if isinstance(value, Tensor) and value.shape == fragment.flat.shape:
                    state[name][key] = self._part_of(self._gathered(value, fragment, parameter))
                elif isinstance(value, Tensor) and value.dim():
                    raise UserError(
                        f"{type(optimizer).__name__} keeps {key} in another shape than its parameters', which can't be "
                        "put together from ZeRO's flat parts: use ddp"
                    )
                else:
                    state[name][key] = value
        groups = zip(optimizer.param_groups, self._groups, strict=True)
        return {"state": state, "param_groups": [{**group, "params": names} for group, names in groups]}

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        for name, parameter in self._trained():
            fragment = self._fragments[parameter]
            for key, value in state["state"].get(name, {}).items():
                own = optimizer.state.setdefault(fragment.flat, {})
                if isinstance(value, Tensor) and value.shape == whole_shape(parameter):
                    whole = _full(value).reshape(-1)
                    flat = own.setdefault(key, torch.zeros_like(fragment.flat, dtype=whole.dtype, requires_grad=False))
                    mine = whole[fragment.begin : fragment.begin + fragment.length]
                    flat[fragment.start : fragment.start + fragment.length] = mine
                else:
                    group = optimizer.param_groups[self._group_of[name]]
                    on_device = isinstance(value, Tensor) and (group.get("fused") or group.get("capturable"))
                    own[key] = value.to(fragment.flat.device) if on_device else value

    def room(self, section: str, name: str, like: Tensor) -> Tensor | None:
        known = self._parameters.get(name)
        is_cut = self._stage == 3 or section == "optimizer"
        if not is_cut or known is None or whole_shape(known) != like.shape:
            return None
        return dtensor.empty(*like.shape, dtype=like.dtype, device_mesh=self._mesh, placements=[Shard(0)])

    # -- flat parts ------------------------------------------------------------------------------

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        known = self._parameters
        return [(name, known[name]) for name in self._group_of if known[name].requires_grad]

    def _gathered(self, flat: Tensor, fragment: Fragment, parameter: nn.Parameter) -> Tensor:
        """The whole of what ranks have of it in flat tensors like this one. All ranks take part."""
        shape = whole_shape(parameter)
        whole = torch.zeros(shape.numel(), dtype=flat.dtype, device=self.world.device)
        mine = flat[fragment.start : fragment.start + fragment.length]
        whole[fragment.begin : fragment.begin + fragment.length] = mine
        dist.all_reduce(whole.view(torch.uint8))  # of bytes: each is zero on all ranks but one
        return whole.view(shape)

    def _part_of(self, whole: Tensor) -> Tensor:
        """What this rank has of it in a checkpoint. No collective."""
        part = distribute_tensor(whole.cpu(), self._mesh, [Shard(0)], src_data_rank=None)
        return part.clone()  # else it would keep the whole one


def _full(value: Tensor) -> Tensor:
    """All of what a checkpoint has in parts. All ranks take part."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _problem(error: Any) -> Problem:
    path = ".".join(["deepspeed.zero_optimization", *map(str, error["loc"])])
    return Problem("unknown key" if error["type"] == "extra_forbidden" else error["msg"], path)


def _deepspeed(device: torch.device) -> Any:
    """The library, imported for this device. Not before it is needed: it takes seconds, and looks for GPUs."""
    if device.index is not None:  # which may be another number than this rank's
        os.environ["LOCAL_RANK"] = str(device.index)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    require("fit.strategy: deepspeed", "deepspeed")
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:  # it is of another torch, or CUDA
        raise UserError(f"fit.strategy: deepspeed can't be imported: {first_line(error)}") from None
    logging.getLogger("DeepSpeed").addFilter(lambda record: "untested optimizer" not in record.getMessage())
    if device.type == "cpu":
        leave_out_shm(deepspeed)
    return deepspeed
