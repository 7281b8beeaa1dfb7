"""Activation checkpointing: memory for time. A block's activations are dropped, and recomputed when they are needed.

(Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from dtrain.errors import UserError, first_line

from ..distributed.torch_versions import is_of_device
from .blocks import of_classes
from .buffers import Buffers, copies_of, put_back


def recompute_activations(net: nn.Module, classes: Sequence[str]) -> None:
    """Make the model's modules of these classes recompute their activations in the backward pass.

    Their results are the same to the bit, dropout's masks and batch norm's statistics included; their parameters'
    names too. Of modules within each other, the outermost do.

    Raises:
        UserError: there is no module of a class.
    """
    inner: set[nn.Module] = set()
    for module in of_classes(net, classes, "fit.activation_checkpointing"):
        if module not in inner:
            inner.update(module.modules())
            context = functools.partial(_contexts, module)
            # A module around it would change the parameters' names.
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, context_fn=context)


Context = contextlib.AbstractContextManager[None]


def _contexts(module: nn.Module) -> tuple[Context, Context]:
    """Around the first forward pass, and around the one that repeats it."""
    return contextlib.nullcontext(), _again(module, copies_of(module))


@contextlib.contextmanager
def _again(module: nn.Module, before: Buffers) -> Iterator[None]:
    """With the buffers as they were; afterwards they are what they have become, and nothing is counted twice."""
    after = copies_of(module)
    put_back(module, before)
    try:
        yield
    except RuntimeError as error:
        if is_of_device(error):
            raise
        raise UserError(
            f"fit.activation_checkpointing: {type(module).__name__} can't be computed a second time: "
            f"{first_line(error)}; it must do the same whatever the first time has left behind, such as a cache of "
            "keys and values (for transformers' models: use_cache: false)"
        ) from error
    finally:  # torch exits through an exception once it has all that it needs
        put_back(module, after)
