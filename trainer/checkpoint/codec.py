"""Nested Python state as named tensors, and back to the bit: nothing is pickled, so reading it executes nothing.

A tensor's name is its path in the tree ("optimizer/state/conv.weight/exp_avg"). Everything else becomes one JSON
text, which is stored as a tensor of bytes. In it, null, true, numbers, strings and lists stand for themselves; an
object has one key, which says what its value stands for: {"tuple": [1, 2]}.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import UserError

from ..distributed.torch_private import sparse_parts

TEXT = "state.json"  # the name of the tensor that holds the text
DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}

_SEQUENCES: dict[type, str] = {tuple: "tuple", torch.Size: "Size"}
_SETS: dict[type, str] = {set: "set", frozenset: "frozenset"}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}
_FACTORIES: dict[str, Any] = {"None": None, **{kind.__name__: kind for kind in (int, float, list, dict, set)}}


def flatten(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """The state as tensors: its own, not copied, by their paths after `prefix`, and the text of the rest.

    Raises:
        UserError: something in it is not data (a function, an object of some class); the message names it.
    """
    tensors: dict[str, Tensor] = {prefix + TEXT: torch.empty(0)}
    text = json.dumps(_encode(state, prefix.rstrip("/"), tensors), separators=(",", ":"))
    tensors[prefix + TEXT] = torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)
    return tensors


def require_data(name: str, owner: Any, state: Any) -> None:
    """Raise UserError if `flatten` would refuse the state of the part of that name."""
    try:
        flatten(state, f"{name}/")
    except UserError as error:
        kind = type(owner).__name__
        raise UserError(f"{error}; give {kind} a state_dict of such, and a load_state_dict") from None


def unflatten(tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """The state that `flatten` turned into these tensors. Malformed text raises what its parser raises."""
    return _decode(json.loads(bytes(tensors[prefix + TEXT].numpy())), tensors)


def _encode(value: Any, path: str, tensors: dict[str, Tensor] | None) -> Any:
    """The value in JSON's types. Without `tensors` it is a key, or in a set, and must consist of plain values."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:  # JSON's parser limits the digits
        return value if -(2**63) <= value < 2**63 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if kind is bytes:
        return {"bytes": value.hex()}
    if kind is torch.dtype:
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, np.generic) and _is_plain(value.dtype):
        return {"scalar": [value.dtype.str, value.tobytes().hex()]}
    if kind in _SETS:
        return {_SETS[kind]: [_encode(item, f"{path}/{item}", None) for item in value]}
    if kind is list or kind in _SEQUENCES:
        items = [_encode(item, _join(path, i), tensors) for i, item in enumerate(value)]
        return items if kind is list else {_SEQUENCES[kind]: items}
    if tensors is None:
        raise _refusal(value, path)
    if kind in _MAPPINGS:
        # A module's state_dict carries the versions of its classes as an attribute.
        attributes = {} if kind is dict else vars(value)
        more = [_encode(attributes, _join(path, "attributes"), tensors)] if attributes else []
        return {_MAPPINGS[kind]: [_pairs(value, path, tensors), *more]}
    if kind is defaultdict and value.default_factory in _FACTORIES.values():
        return {"defaultdict": [_pairs(value, path, tensors), getattr(value.default_factory, "__name__", "None")]}
    if kind is deque:
        return {"deque": [_encode(list(value), path, tensors), value.maxlen]}
    if isinstance(value, np.ndarray) and _is_plain(value.dtype):
        data = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.size else torch.empty(0)
        return {"array": [value.dtype.str, list(value.shape), _add(data, path, tensors)]}
    if isinstance(value, Tensor) and _is_dense(value):
        return {"tensor": _add(value.detach(), path, tensors)}
    if isinstance(value, Tensor) and value.layout is torch.sparse_coo:
        # By its parts, since those of a tensor that is not coalesced may be summed in another order later.
        parts = sparse_parts(value.detach())
        return {"sparse": [_pairs(parts, path, tensors), list(value.shape), value.is_coalesced()]}
    raise _refusal(value, path)


def _pairs(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> list[Any]:
    return [
        [_encode(key, f"{path} (a key)", None), _encode(item, _join(path, key), tensors)] for key, item in value.items()
    ]


def _join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def _add(tensor: Tensor, path: str, tensors: dict[str, Tensor]) -> str:
    while path in tensors:  # keys 1 and "1", or a key with a slash
        path += "'"
    tensors[path] = tensor
    return path


def _is_plain(dtype: np.dtype[Any]) -> bool:
    return dtype.kind in "biufcSUmM"


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def _refusal(value: Any, path: str) -> UserError:
    described = f"a {type(value).__name__}"
    if isinstance(value, Tensor) and not _is_dense(value):
        described = "a tensor that is compressed, nested, quantized or without values"
    return UserError(
        f"a checkpoint can't hold {path or 'the state'}: it is {described}, and only plain data is saved: numbers, "
        "strings, lists, dicts, sets, arrays and tensors"
    )


def _decode(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if isinstance(tree, dict):
        [(tag, content)] = tree.items()
        return _DECODERS[tag](content, tensors)
    return tree


def _decode_mapping(kind: type) -> Callable[[Any, Mapping[str, Tensor]], Any]:
    def decode(content: Any, tensors: Mapping[str, Tensor]) -> Any:
        pairs, *more = content
        result = kind((_decode(key, tensors), _decode(item, tensors)) for key, item in pairs)
        for attributes in more:
            vars(result).update(_decode(attributes, tensors))
        return result

    return decode


def _decode_items(kind: type) -> Callable[[Any, Mapping[str, Tensor]], Any]:
    return lambda content, tensors: kind(_decode(content, tensors))


def _decode_sparse(content: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    pairs, shape, is_coalesced = content
    parts = _decode_mapping(dict)([pairs], tensors)
    return torch.sparse_coo_tensor(**parts, size=shape, is_coalesced=is_coalesced, check_invariants=True)


def _decode_counter(content: Any, tensors: Mapping[str, Tensor]) -> Any:
    return Counter(_decode_mapping(dict)(content, tensors))  # of pairs it would count each


_DECODERS: dict[str, Callable[[Any, Mapping[str, Tensor]], Any]] = {
    "int": lambda content, _: int(content, 16),
    "float": lambda content, _: struct.unpack(">d", bytes.fromhex(content))[0],
    "bytes": lambda content, _: bytes.fromhex(content),
    "dtype": lambda content, _: DTYPES[content],
    "scalar": lambda content, _: np.frombuffer(bytes.fromhex(content[1]), np.dtype(content[0]))[0],
    "tensor": lambda content, tensors: tensors[content],
    "sparse": _decode_sparse,
    "array": lambda content, tensors: (
        np.frombuffer(tensors[content[2]].numpy().tobytes(), np.dtype(content[0])).reshape(content[1]).copy()
    ),
    "deque": lambda content, tensors: deque(_decode(content[0], tensors), content[1]),
    "defaultdict": lambda content, tensors: defaultdict(
        _FACTORIES[content[1]], _decode_mapping(dict)(content[:1], tensors)
    ),
    **{name: _decode_mapping(kind) for kind, name in _MAPPINGS.items()},
    "Counter": _decode_counter,
    **{name: _decode_items(kind) for kind, name in (_SEQUENCES | _SETS).items()},
}
