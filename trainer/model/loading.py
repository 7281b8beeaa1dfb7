"""From a file of weights into a model: one that others have written too, or a part of it, or under other names."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import Problem, UserError, did_you_mean, first_line
from dtrain.schema.packages import require
from dtrain.schema.sections import InitFrom

from .buffers import buffers_of, is_extra, make_room, shapes_of
from .patterns import called, match, require_matches
from .weights import bare_name, mismatches, some, uncompiled, without_shape

Naming = Callable[[str], str]


def load_weights(net: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a weights file into the module, wherever it was saved: wrappers' prefixes are stripped.

    Also one in the safetensors format, one of Lightning's, or the best weights in a run folder. Nothing in the file is
    executed.

    Raises:
        UserError: no such file, not a weights file, or weights of another model; the module is unchanged.
    """
    _load(net, InitFrom(weights=os.fspath(path)))


def begin_from(net: nn.Module, given: InitFrom | None, say: Callable[[str], None], *, is_needed: bool = True) -> None:
    """Have the model begin with weights from a file, and say with which in three lines.

    Args:
        is_needed: whether the file must be there; not where a checkpoint takes its place.

    Raises:
        UserError: the file can't be loaded as asked; the model is unchanged.
    """
    if given is None or not (is_needed or given.file.exists()):
        return
    try:
        done = _load(net, given)
    except UserError as error:
        raise UserError([replace(each, path=each.path or "init_from") for each in error.problems]) from None
    total = len(done.loaded) + len(done.left_new)
    say(f"init_from: loaded {len(done.loaded)} of the model's {total} tensors from {given.weights}")
    say(f"init_from: left out of the file: {some(done.left_out) or 'nothing'}")
    say(f"init_from: left new in the model: {some(done.left_new) or 'nothing'}")


@dataclass(frozen=True)
class _Done:
    """Names of tensors: the model's, and the file's of those that were left out."""

    loaded: list[str]
    left_out: list[str]
    left_new: list[str]


def _load(net: nn.Module, given: InitFrom) -> _Done:
    own, (found, names) = net.state_dict(keep_vars=True), _by_the_same_names(net, given)
    skipped = _skipped(net, found, names, given.skip)
    kept = {short: value for short, value in found.items() if short not in skipped}
    loaded = [short for short in names if short in kept]
    # A tensor with two names may be in the file under one of them.
    there = {id(own[names[short]]) for short in loaded if isinstance(own.get(names[short]), Tensor)}
    left_new = [short for short in names if short not in kept and id(own.get(names[short])) not in there]
    compared = [*loaded, *(short for short in left_new if short not in skipped)] if given.strict else loaded
    shapes = shapes_of(kept if given.strict else {short: kept[short] for short in loaded})
    # Buffers may have grown, or have no value yet.
    fixed = own.keys() - buffers_of(net).keys() - set(without_shape(net))
    own_shapes = {short: own[names[short]].shape if names[short] in fixed else shapes.get(short) for short in compared}
    if problems := mismatches(shapes, own_shapes):
        raise UserError(f"{given.file} holds weights of another model: {'; '.join(problems)}")
    if found and not loaded:
        raise UserError(f"none of the {len(found)} tensors in {given.file} would be loaded: {some(list(found))}")
    state = {names[short]: kept[short] for short in loaded}
    make_room(net, state, torch.device("cpu"))
    net.load_state_dict(state, strict=False)
    return _Done(loaded, [short for short in found if short not in loaded], left_new)


def _by_the_same_names(net: nn.Module, given: InitFrom) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's tensors by the model's bare names, and the model's own names by these."""
    weights, own = _read(given.file), list(net.state_dict())
    in_file, in_model = _naming(list(weights), own, given.rename)
    found = {in_file(name): value for name, value in weights.items()}
    if len(found) < len(weights):
        twice, _ = Counter(map(in_file, weights)).most_common(1)[0]
        raise UserError(Problem(f"several tensors in {given.file} would be called {twice}", "init_from.rename"))
    without_value = [name for name in buffers_of(net) if in_model(name) in found]  # no part of a state_dict
    return found, {in_model(name): name for name in [*own, *without_value]}


def _skipped(net: nn.Module, found: Iterable[str], names: Mapping[str, str], patterns: Sequence[str]) -> set[str]:
    """Which of the file's and the model's tensors are not to be loaded."""
    aliases = {short: {short} for short in found}
    aliases |= {short: {short, *called(net, name)} for short, name in names.items()}
    require_matches(patterns, [alias for each in aliases.values() for alias in each], "init_from.skip", "tensor")
    return {short for short, each in aliases.items() if match(each, patterns)}


def _read(file: Path) -> dict[str, Any]:
    """The tensors in a file, by name. Nothing in it is executed."""
    is_safetensors = file.suffix == ".safetensors"
    if is_safetensors:
        require(str(file), "safetensors")
    try:
        weights = _read_safetensors(file) if is_safetensors else torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no such file: {file}") from None
    except Exception as error:  # whatever the parser met
        raise UserError(f"{file} is not a weights file: {_code_in(file) or first_line(error)}") from None
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)  # Lightning's, beside the rest of a checkpoint
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and (isinstance(value, Tensor) or is_extra(name)) for name, value in weights.items()
    ):
        raise UserError(f"{file} holds no state_dict: expected tensors by name")
    return weights


def _read_safetensors(file: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(file)


def _code_in(file: Path) -> str | None:
    """What in a file would be executed, in words."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # it is no file of torch's
        return None
    message = "and loading these could execute code; if you trust it, save the state_dict in it as a file of its own"
    return f"it needs {some(unsafe)}, {message}" if unsafe else None


def _naming(in_file: Sequence[str], in_model: Sequence[str], rename: Mapping[str, str]) -> tuple[Naming, Naming]:
    """What to take the names in the file and in the model for, so that most of them meet.

    The names as they are come first: a model may have a layer that is called `module`.

    Raises:
        UserError: no name in the file is to be renamed so.
    """
    pairs = list(
        itertools.product((uncompiled, bare_name, _without_lightnings), (uncompiled, bare_name, _without_pefts))
    )

    def meeting(pair: tuple[Naming, Naming]) -> int:
        return len({_renamed(pair[0](name), rename) for name in in_file} & set(map(pair[1], in_model)))

    of_file, of_model = max(pairs, key=meeting)  # the first of the best
    beginnings = {part for name in in_file for part in _beginnings(of_file(name))}
    for old in rename:
        if old not in beginnings:
            hint = did_you_mean(old, beginnings)
            raise UserError(
                Problem(f"no tensor's name in the file is {old} or begins with it", "init_from.rename", hint=hint)
            )
    return lambda name: _renamed(of_file(name), rename), of_model


def _without_lightnings(name: str) -> str:
    """`model.conv.weight` -> `conv.weight`: a LightningModule mostly has its network as `model`."""
    return bare_name(bare_name(name).removeprefix("model."))


def _without_pefts(name: str) -> str:
    """`base_model.model.conv.base_layer.weight` -> `conv.weight`: PEFT puts its adapters around a model's layers."""
    parts = bare_name(name).removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _beginnings(name: str) -> Collection[str]:
    """`a.b.c` -> ``, `a`, `a.b`, `a.b.c`."""
    return ["", *itertools.accumulate(name.split("."), lambda path, part: f"{path}.{part}")]


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    """The name with the longest of its beginnings that has a new one exchanged."""
    for old in reversed([each for each in _beginnings(name) if each in rename]):
        return ".".join(filter(None, (rename[old], name[len(old) :].removeprefix("."))))
    return name
