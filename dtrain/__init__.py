"""dtrain: one YAML file describes a PyTorch training job; any number of GPUs gives the same result."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.errors import RanksFailed, UserError
    from dtrain.launcher.function import launch
    from dtrain.schema.sections import Fsdp
    from dtrain.trainer import Trainer, load_weights
    from dtrain.trainer.callbacks.averaging import WeightAveraging
    from dtrain.trainer.callbacks.pictures import SamplePictures
    from dtrain.trainer.callbacks.profiler import Profiler
    from dtrain.trainer.fit.callbacks import FitContext
    from dtrain.trainer.loss.losses import FocalLoss, MulticlassFocalLoss, SCELoss, WeightedMean
    from dtrain.trainer.ranks import Ranks
    from dtrain.trainer.summary import summary

__version__ = "0.1.0"
__all__ = [
    "Trainer",
    "FitContext",
    "Fsdp",
    "Ranks",
    "launch",
    "load_weights",
    "summary",
    "FocalLoss",
    "MulticlassFocalLoss",
    "SCELoss",
    "WeightedMean",
    "Profiler",
    "SamplePictures",
    "WeightAveraging",
    "RanksFailed",
    "UserError",
    "__version__",
]
_MODULES = {
    "dtrain.trainer": ("Trainer", "load_weights"),
    "dtrain.trainer.loss.losses": ("FocalLoss", "MulticlassFocalLoss", "SCELoss", "WeightedMean"),
    "dtrain.trainer.callbacks.averaging": ("WeightAveraging",),
    "dtrain.trainer.callbacks.pictures": ("SamplePictures",),
    "dtrain.trainer.callbacks.profiler": ("Profiler",),
    "dtrain.trainer.fit.callbacks": ("FitContext",),
    "dtrain.trainer.ranks": ("Ranks",),
    "dtrain.trainer.summary": ("summary",),
    "dtrain.schema.sections": ("Fsdp",),
    "dtrain.launcher.function": ("launch",),
    "dtrain.errors": ("RanksFailed", "UserError"),
}


def __getattr__(name: str) -> object:
    # Most need torch (seconds to import); `dtrain --help` must not wait for it.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
