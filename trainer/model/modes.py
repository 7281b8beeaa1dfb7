"""Which parts of a model are in training mode and which in evaluation mode: as the user's code has set them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn


def begin_training(net: nn.Module) -> None:
    """Put the model into training mode, except for parts that are meant to stay in evaluation mode.

    Those are the ones that are in it while the model trains, such as a frozen backbone's batch norm, and the ones that
    the model's own `train` puts there. A model that is in evaluation mode as a whole was left so by what came before.
    """
    modes = {module: module.training or not net.training for module in net.modules()}
    net.train()
    _set_modes({module: mode and module.training for module, mode in modes.items()})


@contextlib.contextmanager
def evaluation_mode(net: nn.Module) -> Iterator[None]:
    """In the block, the whole model is in evaluation mode; afterwards each part is in the mode it was in before."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        _set_modes(modes)


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():  # parents come before their children
        if module.training is not mode:
            module.train(mode)
