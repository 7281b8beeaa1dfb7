"""dtrain: one YAML file describes a PyTorch training job; any number of GPUs gives the same result."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.job import Fsdp
    from dtrain.trainer import Trainer, load_weights

__version__ = "0.1.0"
__all__ = ["Trainer", "Fsdp", "load_weights", "__version__"]


def __getattr__(name: str) -> object:
    # They need torch (seconds to import); `dtrain --help` must not wait for it.
    if name in ("Trainer", "load_weights"):
        import dtrain.trainer

        return getattr(dtrain.trainer, name)
    if name == "Fsdp":
        import dtrain.job

        return dtrain.job.Fsdp
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
