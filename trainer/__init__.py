"""Everything that runs in a worker: the only home of the training code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model.loading import load_weights
    from .trainer import Trainer

__all__ = ["Trainer", "load_weights"]


def __getattr__(name: str) -> object:
    # The tracker is a process of this package that needs no torch.
    if name == "Trainer":
        from .trainer import Trainer

        return Trainer
    if name == "load_weights":
        from .model.loading import load_weights

        return load_weights
    raise AttributeError(f"module 'dtrain.trainer' has no attribute {name!r}")
