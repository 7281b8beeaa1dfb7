"""A model across ranks, as the loop uses it; the base class of the strategies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from dtrain.errors import UserError

from ..checkpoint.optimizer_state import load_named_state, named_state, parameter_groups
from ..checks.agreement import require_same_model
from ..data.indexed import MicroBatch
from ..distributed.seeds import rng_kept
from ..distributed.world import World
from ..loss.step import Outcome, Step
from ..model.buffers import Buffers, buffers_of, copies_of, make_room, on_device, put_back, shapes_of, share_buffers
from ..model.learned_loss import LearnedLoss
from ..model.modes import evaluation_mode
from ..model.sync_batchnorm import counting_no_sample
from ..model.weights import bare_state_dict

_cut: WeakSet[nn.Module] = WeakSet()  # modules whose parameters a strategy has replaced; no other can use them


class Parallel:
    """A model on each rank, with rank 0's weights and buffers; holds the defaults for all strategies.

    Attributes:
        loss: what the loss has of its own.
        bare: the model under its own names, which a step is given and which is saved.
        module: whose forward pass stands around a step's, so that the backward pass averages the gradients.
        forwards_together: whether a forward pass is a collective too, in evaluation as in training.
    """

    forwards_together = False

    def __init__(self, net: nn.Module, world: World, *, sync_batchnorm: bool = False) -> None:
        require_uncut(net)
        self.world = world
        require_same_model(world, net)
        if sync_batchnorm and world.world_size > 1:
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        self.bare = net
        self.module: nn.Module = net
        self.loss = LearnedLoss(None, net, world)
        self._trainable = trainable(net)

    def adopt(self, optimizer: Optimizer | None) -> None:
        """Have an optimizer that was made of the model's parameters train what this rank has of them now.

        All ranks take part. None: the model is only evaluated.
        """

    def run(self, step: Step, micro_batch: MicroBatch) -> Outcome:
        """What the step finds with the bare model, within a forward pass of `module`.

        So a step may use all that the model has, its methods and submodules too, and whatever wraps the model is ready
        for the backward pass. All ranks take part where `forwards_together`.
        """
        return step(self.bare, micro_batch)

    def cut(self) -> None:
        """Mark the model as sharded, so that no other strategy takes it: its parameters are replaced."""
        _cut.update(self.bare.modules())

    def called(self) -> nn.Module:
        """The model for a loop of the user's own, which calls it like `bare`. All ranks take part."""
        return self.bare

    def expect_backward(self, loss: Tensor) -> None:
        """See that the backward pass of this loss, of such a loop's, averages the gradients. No collective."""

    def end_batch(self, losses: Sequence[Tensor]) -> None:
        """Raise UserError where such a loop's batch has trained only a part of what it should. No collective.

        Args:
            losses: those of its last micro-batch.
        """

    def follow_trained(self) -> None:
        """Train what requires a gradient now, which may have changed since the last call. All ranks take part.

        Raises:
            UserError: it has, and the strategy can't follow.
        """
        if changed := sorted(self._trainable.keys() ^ trainable(self.bare).keys()):
            raise UserError(
                f"requires_grad of {shortened(changed)} was changed after Trainer sharded the model; change it "
                "before, on a new model with these weights, or use ddp"
            )

    def divide(self, optimizers: Sequence[Optimizer]) -> None:
        """Be ready for backward passes of which each is for one of these optimizers alone; none: each is for all.

        All ranks take part.

        Raises:
            UserError: the strategy can't.
        """
        if optimizers:
            raise UserError("a step that yields its losses needs the strategy ddp or fsdp")

    def expect(self, loss: Tensor, optimizer: Optimizer, place: int) -> Tensor:
        """The loss whose backward pass averages the gradients of this optimizer's parameters; after `divide`.

        Args:
            place: of the loss among those of a step, from 0.
        """
        return loss

    def pass_over(self) -> None:
        """Follow on forward passes in training without a backward pass. All ranks take part."""

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a micro-batch's forward and backward: only the batch's last one averages the gradients."""
        return contextlib.nullcontext()

    def require_all_used(self, loss: Tensor, optimizer: Optimizer) -> None:
        """Raise UserError where the first loss leaves out parameters that the strategy, or anyone, can't do without."""

    def require_averaged(self, loss: Tensor, step: int) -> None:
        """Raise UserError where this loss's backward pass has left out parameters that others wait for.

        After a batch's last micro-batch, that of step number `step`. All ranks take part in the process's first one.
        """

    def backward(self, loss: Tensor, optimizer: Optimizer | None = None) -> None:
        """Add the loss's gradient to the parameters'. All ranks take part, at a batch's last micro-batch at least.

        Args:
            optimizer: whose parameters need it; the others may get one too.
        """
        loss.backward(inputs=None if optimizer is None else self.trained(optimizer))

    def zero_grad(self, optimizer: Optimizer) -> None:
        """Begin a step without gradients."""
        optimizer.zero_grad()

    def gradients(self, optimizer: Optimizer) -> list[Tensor]:
        """What this rank has of the batch's gradient, to be changed in place, between `backward` and `step`."""
        return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def trained(self, optimizer: Optimizer) -> list[Tensor]:
        """What this rank has of what the optimizer trains."""
        return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]

    def norm(self, gradients: list[Tensor]) -> Tensor:
        """The Euclidean norm of the whole gradient. All ranks take part where each has a part."""
        norm = get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, optimizer: Optimizer) -> bool:
        """Make the optimizer's step; False if the strategy skipped it because of non-finite gradients."""
        optimizer.step()
        return True

    def drop_gradients(self) -> None:
        """Discard these gradients without a step."""

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around an evaluation of `bare`, whose parts are then in the modes that they were in."""
        with evaluation_mode(self.bare):
            yield

    def weights(self, instead: Mapping[int, Tensor] | None = None) -> dict[str, Any]:
        """The whole model's state_dict, on rank 0; elsewhere nothing that is needed. All ranks take part.

        Args:
            instead: what stands for a parameter of `bare`, by its id.
        """
        return bare_state_dict(self.bare, instead)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of the model: whole tensors, or DTensors; extra states. All ranks take part."""
        return self.bare.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` gave, on any number of ranks with any strategy. All ranks take part."""
        make_room(self.bare, state, self.world.device)
        self.bare.load_state_dict(state)

    def own_buffers(self) -> Buffers:
        """What this rank has of the model's buffers, which the others may have otherwise. No collective."""
        return buffers_of(self.bare)

    def load_own_buffers(self, values: Buffers | list[Tensor]) -> None:
        """Become what `own_buffers` gave, or in older checkpoints a list without names. No collective."""
        if isinstance(values, list):
            values = dict(zip(dict(self.bare.named_buffers()), values, strict=True))
            values = {**self.own_buffers(), **values}
        put_back(self.bare, on_device(values, self.world.device))

    def shapes(self) -> dict[str, Any]:
        """Those of `state_dict`'s tensors. No collective."""
        return shapes_of(self.bare.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """`optimizer.state_dict()` with the names of the parameters instead of their numbers. All ranks take part."""
        return named_state(optimizer, self.bare)

    def own_optimizer_state(self, optimizer: Optimizer) -> Any:
        """What this rank has of it, to see whether it can be saved. No collective."""
        return named_state(optimizer, self.bare)

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Become what `optimizer_state` gave, as `load_state_dict` does. All ranks take part."""
        load_named_state(optimizer, self.bare, state)

    def parameter_groups(self, optimizer: Optimizer) -> list[list[str]]:
        """The names of the parameters of each group. No collective."""
        return parameter_groups(optimizer, self.bare)

    def room(self, section: str, name: str, like: Tensor) -> Tensor | None:
        """Room on the device for a tensor of a checkpoint, or for this rank's part of it (a DTensor); None: the CPU's.

        It may be the parameter itself: a checkpoint that can't be used is followed by another one, or by the end.

        Args:
            section: "model" or "optimizer".
            name: of the parameter that the tensor belongs to; a state of its optimizer may have another shape.
            like: the tensor as it was saved, without its numbers (on the meta device).
        """
        return None

    @contextlib.contextmanager
    def preserving_state(self) -> Iterator[None]:
        """Buffers and random states after the block are what they were before it, and other ranks' statistics too.

        For a filler's forward and backward, both: autograd refuses buffers that changed in between.
        """
        before, loss_before = copies_of(self.bare), copies_of(self.loss.module)
        with rng_kept(self.world.device), counting_no_sample(self.bare):
            yield
        put_back(self.bare, before)
        put_back(self.loss.module, loss_before)

    @contextlib.contextmanager
    def trying(self) -> Iterator[None]:
        """Around forward passes in training that no backward pass follows, and that leave no trace."""
        with self.preserving_state():
            yield

    def share_buffers(self) -> None:
        """Give all ranks rank 0's buffers, of the model and of its loss. All ranks take part."""
        share_buffers(self.bare, self.world)
        self.loss.share_buffers()


class Stepping(nn.Module):
    """A model whose forward pass is whatever is to be done with it: what a strategy wraps instead of the model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, function: Callable[[nn.Module], Tensor]) -> Tensor:
        return function(self.net)


def run_within(module: nn.Module, step: Step, micro_batch: MicroBatch) -> Outcome:
    """The step within the forward pass of a wrapped `Stepping`, which sees the tensor that backward begins with."""
    found: list[Outcome] = []

    def function(net: nn.Module) -> Tensor:
        found.append(step(net, micro_batch))
        return found[0].total

    total = module(function)
    return replace(found[0], total=total)


def require_all_used(awaited: Mapping[str, nn.Parameter], loss: Tensor, when: str = "", mend: str = "") -> None:
    """Raise UserError if the loss does not depend on one of these trainable parameters.

    Args:
        when: it was.
        mend: what may be done beside what helps in all strategies.
    """
    reached = reached_leaves(loss)
    if reached is None:
        return
    unused = [name for name, parameter in awaited.items() if id(parameter) not in reached]
    if unused:
        raise UserError(
            f"the loss{when} does not depend on the parameters {shortened(unused)}, and their gradients are to be "
            f"averaged over the ranks; remove them from the model, or freeze them: requires_grad_(False){mend}"
        )


def require_uncut(net: nn.Module) -> None:
    """Raise UserError for a model whose parameters a strategy has already replaced."""
    if any(module in _cut for module in net.modules()):
        raise UserError(
            "another Trainer has sharded the model; call that Trainer's fit again, or make a new model "
            "with its weights (weights/last.pt)"
        )


def matches(tensor: Tensor, like: Tensor) -> bool:
    """Whether it can hold the other one's numbers as they are."""
    return (tensor.shape, tensor.dtype) == (like.shape, like.dtype)


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are to be trained, by name."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def shortened(names: Sequence[str]) -> str:
    """The first five in a row."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def reached_leaves(loss: torch.Tensor) -> set[int] | None:
    """The ids of the leaves of the loss's graph, those that get a gradient from it.

    None where the graph holds a function written in Python, reentrant checkpointing for one: its backward pass may
    reach leaves that the graph does not show.
    """
    seen, pending, leaves = set(), [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return None
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        pending += [following for following, _ in node.next_functions]
    return leaves


def require_divisible(net: nn.Module) -> None:
    """Raise UserError if a parameter can't be sharded along its first dimension, or as a flat row."""
    for name, parameter in net.named_parameters():
        if parameter.dim() == 0:
            raise UserError(f"{name} is a scalar, which can't be sharded: give it the shape (1,), or use ddp")
        if not parameter.is_contiguous():
            raise UserError(
                f"{name} can't be sharded: it is not contiguous (channels_last, or a "
                "transposed tensor); make it contiguous, or use ddp"
            )
    if has_sparse_gradients(net):
        raise UserError("sparse gradients can't be summed in parts: Embedding(sparse=False), or use ddp")


def has_sparse_gradients(net: nn.Module) -> bool:
    """Whether a part of torch's own will have some; what calls functional.embedding(sparse=True) does not show it."""
    parts = [part for part in net.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    return any(part.sparse and part.weight.requires_grad for part in parts)
