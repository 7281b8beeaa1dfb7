"""A model across ranks by a strategy's name, whose module is imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

from dtrain.schema.sections import Fit
from dtrain.schema.strategies import STRATEGIES

from ..distributed.world import World
from .base import Parallel


def parallel(net: nn.Module, world: World, strategy: Any, fit: Fit, dtype: torch.dtype | None) -> Parallel:
    """The model as `fit.strategy` has it. All ranks take part.

    Args:
        strategy: as the user gave it: the name, or the strategy's settings.
        dtype: in which it computes; None for the parameters' own.
    """
    module: Any = import_module(STRATEGIES[fit.strategy].module)
    made: Parallel = module.parallel(net, world, None if isinstance(strategy, str) else strategy, fit, dtype)
    return made
