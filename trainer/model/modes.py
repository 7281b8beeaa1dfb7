"""Which parts of a model train and which are in evaluation mode: as the user's code has set them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn


def begin_training(net: nn.Module) -> None:
    """Put the model into training mode, but for the parts that are in evaluation mode within one that trains.

    Those were put there on purpose, a frozen backbone's batch norm for one. A model that is in evaluation mode as a
    whole was left so by what came before.
    """
    modes = {module: module.training or not net.training for module in net.modules()}
    net.train()  # a model's own method may do more than set modes
    _set_modes(modes)


@contextlib.contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """In the block, all of the model is in evaluation mode; afterwards each part is in the mode it was in."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        _set_modes(modes)


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():  # those that hold others come first
        if module.training is not mode:
            module.train(mode)
