"""Which parameters of a model that FSDP2 has cut get a gradient on this rank."""

from __future__ import annotations

import functools
from collections.abc import Set as AbstractSet

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dtrain.errors import UserError

from ..distributed.world import World
from .base import shortened

SAME = (
    "fsdp needs the same blocks and parameters in each step, on all ranks: drop none of them by the batch or by "
    "chance, or use ddp with fit.unused_parameters: allow"
)


class ParameterUse:
    """By the names that the parameters have in a model; nothing is seen in a world of one, where there is no need.

    Args:
        net: the model.
        root: the module that is cut as a whole.

    Attributes:
        place: of the loss whose gradient is computed, in a step.
    """

    def __init__(self, net: nn.Module, root: nn.Module, world: World) -> None:
        self._net = net
        self._root = root
        self._world = world
        self._used: set[str] = set()  # in this batch
        self._first: dict[int, AbstractSet[str]] = {}  # by the loss's place, what the first one has left out
        self._watched: set[str] = set()
        self.place = 0

    def watch(self) -> None:
        """See what is used from now on. All ranks take part, in gathering each block once.

        A rank that has no gradient for a parameter sums zeros instead: ranks that sum different parameters would
        abort, or take each other's numbers for their own.
        """
        if self._world.world_size == 1:
            return
        assert isinstance(self._root, FSDPModule)
        self._root.set_reduce_scatter_unused_params(True)
        for block in self._root.modules():
            if isinstance(block, FSDPModule):
                block.unshard()
                for name, whole in self._net.named_parameters():
                    if whole.requires_grad and not isinstance(whole, DTensor) and name not in self._watched:
                        whole.register_post_accumulate_grad_hook(functools.partial(_add_name, self._used, name))
                        self._watched.add(name)
                block.reshard()

    def begin(self) -> None:
        """Let the next step decide what each is to use."""
        self.place, self._first = 0, {}

    def take_unused(self, names: AbstractSet[str], step: int) -> AbstractSet[str]:
        """Those that no rank has used in this batch. All ranks take part in the first step.

        Raises:
            UserError: they are others than in the first step.
        """
        if self._world.world_size == 1:
            return set()
        unused = names - self._used
        self._used.clear()
        if self.place not in self._first:
            self._first[self.place] = self._world.from_main(unused)
        if changed := sorted(unused ^ self._first[self.place]):
            raise UserError(
                f"step {step} uses other parameters than the first one did on rank 0: {shortened(changed)}. {SAME}"
            )
        return unused

    def require_all_or_none(self, names: AbstractSet[str]) -> None:
        """Raise UserError where the batch has used some of these and not the others. No collective."""
        used = self._used & names
        self._used.clear()
        if used and (unused := sorted(names - used)):
            raise UserError(
                f"the batch's loss does not depend on the parameters {shortened(unused)}. fsdp needs all of them in "
                "each batch, on all ranks; freeze them: requires_grad_(False), remove them, or use ddp"
            )


def _add_name(names: set[str], name: str, parameter: Tensor) -> None:
    names.add(name)
