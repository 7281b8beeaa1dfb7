"""That all ranks use the same parts of the model, where they gather or sum those together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dtrain.errors import UserError

from ..distributed.world import World
from .base import shortened

_END = "the end"


class SameParts:
    """Sees that each forward pass in training uses the parts of the model that the first one did.

    Where ranks gather a part together, one that leaves it out takes the next part's numbers for its own, and another
    one waits for it without an end. In a fit's first pass the ranks compare each part before they use it; later ones
    need no exchange, since the rank that leaves something out is the one that is ahead.

    Args:
        parts: by their names; what is noted is that they are called.
        mend: what to do about a difference.
    """

    def __init__(self, world: World, parts: Mapping[str, nn.Module], mend: str) -> None:
        self._world = world
        self._mend = mend
        self._used: set[str] | None = None  # what this pass has used; None outside of one
        self.begin_fit()
        for name, part in parts.items():
            part.register_forward_pre_hook(functools.partial(self._note, name), prepend=True)

    def begin_fit(self, *, has_several: bool = False) -> None:
        """Have the next pass be the one that others are compared with.

        Args:
            has_several: a step has several losses, each with parts of its own: compare with all of the next step's.
        """
        self._has_several = has_several
        self._known: set[frozenset[str]] = set()  # what each of these passes has used
        self._first: int | None = None  # the number of their step
        self._is_over = False  # whether they are

    def end_backward(self, step: int) -> None:
        """Follow on a backward pass of the step of that number."""
        self._first = step if self._first is None else self._first
        self._is_over |= step != self._first  # until then, others of its losses may have been to come

    @contextlib.contextmanager
    def required(self) -> Iterator[None]:
        """Around a forward pass; one without gradients is none in training. All ranks take part in the first ones.

        Raises:
            UserError: it uses other parts than those did, or than rank 0.
        """
        if not torch.is_grad_enabled():
            yield
            return
        self._used = set()
        try:
            yield
            used = frozenset(self._used)
            if not self._is_over:
                self._compare(_END)
                self._known.add(used)
                self._is_over = not self._has_several
            elif used not in self._known:
                changed = min((sorted(used ^ each) for each in self._known), key=len)
                raise UserError(
                    f"this step uses other parts than the first one did: {shortened(changed)}. {self._mend}"
                )
        finally:
            self._used = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no types for it
    def _note(self, name: str, part: nn.Module, given: Any) -> None:
        if self._used is None:
            return
        if not self._is_over:
            self._compare(name)
        self._used.add(name)

    def _compare(self, name: str) -> None:
        if (theirs := self._world.from_main(name)) != name:
            raise UserError(f"rank {self._world.rank} goes on to {name} where rank 0 goes on to {theirs}. {self._mend}")
