"""Weights in the usual form: the bare module's state_dict, with the names that its class gives."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dtrain.errors import UserError, first_line
from dtrain.files import write_atomic

from .buffers import buffers_of, is_extra, make_room, shapes_of

WRAPPERS = ("module", "_orig_mod")  # DataParallel's and DDP's, and torch.compile's


def bare_tensors(net: nn.Module) -> dict[str, Any]:
    """What a module's state_dict holds, parameters as such, without the names that torch.compile puts into theirs."""
    return {_uncompiled(name): value for name, value in net.state_dict(keep_vars=True).items()}


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
    return _uncompiled(".".join(parts))


def _uncompiled(name: str) -> str:
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


def load_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a weights file into the module, wherever it was saved: wrappers' prefixes are stripped.

    Nothing in the file is executed.

    Raises:
        UserError: no such file, not a weights file, or weights of another model; the module is unchanged.
    """
    try:
        weights: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except Exception as error:  # torch.load raises whatever its parser met
        raise UserError(f"{path} is not a weights file: {first_line(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) or is_extra(name) for name, w in weights.items()):
        raise UserError(f"{path} holds no state_dict: expected tensors by name")
    own = net.state_dict()
    # The names as they are come first: a model may have a layer that is called `module`.
    bare = _uncompiled if {_uncompiled(name) for name in weights} == {_uncompiled(name) for name in own} else bare_name
    stripped = {bare(name): value for name, value in weights.items()}
    names = {bare(name): name for name in own}
    shapes = shapes_of(stripped)
    buffers = {bare(name): name for name in buffers_of(net) if bare(name) in shapes}  # which may have grown
    lazy = [bare(name) for name in without_shape(net)]
    expected = shapes_of({short: own[name] for short, name in names.items() if short not in lazy})
    problems = mismatches(shapes, expected | {short: shapes.get(short) for short in [*buffers, *lazy]})
    if problems:
        raise UserError(f"{path} holds weights of another model: {'; '.join(problems)}")
    state = {(names | buffers)[short]: value for short, value in stripped.items()}
    make_room(net, state, torch.device("cpu"))
    net.load_state_dict(state)


def without_shape(module: nn.Module) -> list[str]:
    """The names of parameters and buffers that get their shapes from the first batch, or from a state_dict."""
    return [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if is_lazy(tensor)]


def mismatches(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """How the tensors in a file differ from those of a model, by name and shape; a phrase for each difference."""
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{_some(missing)} not in the file")
    if unknown := [name for name in found if name not in expected]:
        problems.append(f"{_some(unknown)} not in the model")
    for name in expected:
        if name in found and found[name] != expected[name]:
            shapes = f"{tuple(found[name])} in the file, {tuple(expected[name])} in the model"
            problems.append(f"{name} is {shapes}")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
