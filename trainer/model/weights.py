"""Weights in the usual form: the bare module's state_dict, with the names that its class gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dtrain.files import write_atomic

WRAPPERS = ("module", "_orig_mod")  # DataParallel's and DDP's, and torch.compile's


def bare_tensors(net: nn.Module) -> dict[str, Any]:
    """What a module's state_dict holds, parameters as such, without the names that torch.compile puts into theirs."""
    return {uncompiled(name): value for name, value in net.state_dict(keep_vars=True).items()}


def bare_state_dict(net: nn.Module, instead: Mapping[int, Tensor] | None = None) -> dict[str, Any]:
    """The module's weights, buffers and extra states by their bare names, not copied.

    Args:
        instead: what stands for a parameter, by its id.
    """
    named = {name: (instead or {}).get(id(value), value) for name, value in bare_tensors(net).items()}
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in named.items()}


def bare_name(name: str) -> str:
    """`module._orig_mod.conv.weight` -> `conv.weight`. A wrapper's name counts in front, torch.compile's anywhere."""
    parts = name.split(".")
    while parts[0] in WRAPPERS and len(parts) > 1:
        parts = parts[1:]
    return uncompiled(".".join(parts))


def uncompiled(name: str) -> str:
    """The name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def save_weights(weights: Mapping[str, Any], path: Path) -> None:
    """Write a state_dict, atomically. A disk that refuses raises an OSError."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                torch.save(dict(weights), file)
            except RuntimeError as error:
                # torch closes the archive after a failed write, and raises for that in turn.
                hidden = error.__context__
                while hidden is not None and not isinstance(hidden, OSError):
                    hidden = hidden.__context__
                raise hidden or error from None

    write_atomic(path, write)


def without_shape(module: nn.Module) -> list[str]:
    """The names of parameters and buffers that get their shapes from the first batch, or from a state_dict."""
    return [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if is_lazy(tensor)]


def mismatches(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """How the tensors in a file differ from those of a model, by name and shape; a phrase for each difference."""
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{some(missing)} not in the file")
    if unknown := [name for name in found if name not in expected]:
        problems.append(f"{some(unknown)} not in the model")
    for name in expected:
        if name in found and found[name] != expected[name]:
            shapes = f"{tuple(found[name])} in the file, {tuple(expected[name])} in the model"
            problems.append(f"{name} is {shapes}")
    return problems


def some(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
