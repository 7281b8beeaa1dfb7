"""Nested state as tensors, and back to the bit."""

from __future__ import annotations

import itertools
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from dtrain.errors import UserError
from dtrain.trainer.checkpoint.codec import TEXT, flatten, unflatten
from dtrain.trainer.distributed.seeds import rng_state


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, and of the same types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.stride() == other.stride() and bits(one) == bits(other)
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=True)
        return (
            len(one) == len(other)
            and all(same(a, b) for a, b in pairs)
            and getattr(one, "__dict__", {}) == getattr(other, "__dict__", {})
        )
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


VALUES: dict[str, Any] = {
    "scalars": [None, True, False, "", "ö\n\ud800/", b"\x00\xff", 0, -1],
    "numbers": [2**63 - 1, -(2**63), 2**63, -(2**64), 10**5000, 0.1, -0.0, 5e-324, math.inf, -math.inf],
    "nan": [math.nan, struct.unpack("d", struct.pack("Q", 0xFFF8000000000123))[0]],
    "containers": [(), (1, (2,)), [], {}, set(), {1, "1", (2.5, None)}, frozenset({b"x"}), torch.Size([2, 3])],
    "mappings": [OrderedDict(b=1, a=2), Counter({3: 2, 4: 0}), deque([1, [2]], maxlen=3)],
    "defaults": [defaultdict(list, {"a": [1]}), defaultdict(int), defaultdict(None, {1: 2})],
    "keys": {0: "int", "0": "str", 0.5: "float", None: "none", (1, "a"): "tuple", b"b": "bytes", 2**70: "large"},
    "what looks like our own": [{"tuple": [1]}, {"tensor": "x"}, [["tuple", 1]]],
    "dtypes": [torch.float32, torch.bfloat16, torch.int64],
    "arrays": [
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.zeros((0, 2)),
        np.array(1.5),
        np.float32(0.1),
        np.uint64(2**64 - 1),
    ],
    "order": np.asfortranarray(np.arange(6).reshape(2, 3))[:, ::-1],
    "generators": rng_state(torch.device("cpu")),
    "legacy generator": np.random.get_state(legacy=True),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_to_the_bit(name):
    assert same(unflatten(flatten(VALUES[name])), VALUES[name])


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int8, torch.uint16]
)
def test_tensors_travel_as_they_are(dtype):
    value = torch.arange(6).to(dtype).reshape(2, 3)
    state = {"a": value, "b": [nn.Parameter(torch.ones(2)), torch.tensor(2.0)], 3: (torch.empty(0, 4),)}
    tensors = flatten(state)
    assert sorted(tensors) == sorted([TEXT, "a", "b/0", "b/1", "3/0"])
    assert tensors["a"].data_ptr() == value.data_ptr()  # no copy
    found = unflatten(tensors)
    assert same(found["a"], value)
    assert same(found["b"][0], torch.ones(2))
    assert found[3][0].shape == (0, 4)


def test_names_do_not_collide():
    ones = [torch.tensor(i) for i in range(4)]
    state = {"a": {"b": ones[0]}, "a/b": ones[1], 1: ones[2], "1": ones[3], TEXT: torch.tensor(5)}
    tensors = flatten(state, "rank-0/")
    assert all(name.startswith("rank-0/") for name in tensors)
    assert same(unflatten(tensors, "rank-0/"), state)


def test_a_modules_versions_go_along():
    state = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict()
    found = unflatten(flatten({"model": state}))["model"]
    assert same(found, state)
    assert found._metadata["1"] == {"version": 2}


def schedulers() -> list[Any]:
    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=torch.tensor(0.1), momentum=0.9)

    first = optimizer()
    parts = [lr_scheduler.LinearLR(first), lr_scheduler.MultiStepLR(first, [1, 1, 3])]
    return [
        lr_scheduler.SequentialLR(first, parts, [2]),
        lr_scheduler.ReduceLROnPlateau(optimizer()),
        lr_scheduler.OneCycleLR(optimizer(), 0.1, total_steps=5),
        lr_scheduler.LambdaLR(optimizer(), lambda step: 1.0),
        lr_scheduler.CyclicLR(optimizer(), 0.1, 0.2),
    ]


@pytest.mark.parametrize("scheduler", schedulers(), ids=lambda scheduler: type(scheduler).__name__)
def test_schedulers(scheduler):
    state = scheduler.state_dict()
    assert same(unflatten(flatten(state)), state)


def test_sparse_tensors_come_back_with_their_parts():
    twice = torch.sparse_coo_tensor(torch.tensor([[2, 0, 2]]), torch.tensor([[1.0], [2.0], [0.1]]), (4, 1))
    state = {"buffer": twice, "indices": 1, "buffer/values": 2, "summed": twice.coalesce()}
    found = unflatten(flatten(state, "rank-0/"), "rank-0/")
    for name in ("buffer", "summed"):
        assert (found[name].is_coalesced(), found[name].shape) == (name == "summed", state[name].shape)
        assert same(found[name]._indices(), state[name]._indices())
        assert same(found[name]._values(), state[name]._values())


class Own:
    pass


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (lambda x: x, "a function"),
        (Own(), "a Own"),
        (Own, "a type"),
        (torch.eye(2).to_sparse_csr(), "a tensor that is compressed.*"),
        (torch.nested.nested_tensor([torch.ones(1)]), "a tensor that .* nested.*"),
        (torch.empty(1, device="meta"), "a tensor .* without values"),
        (np.array([Own()]), "a ndarray"),
        (itertools.count(), "a count"),
        (type("Sub", (dict,), {})(), "a Sub"),
        ({(torch.ones(1),): 1}, "a Tensor"),
        (defaultdict(Own), "a defaultdict"),
    ],
)
def test_what_is_no_data_is_refused_by_name(value, described):
    with pytest.raises(UserError, match=f"can't hold scheduler/lr_lambdas/0.*: it is {described}, and only plain data"):
        flatten({"scheduler": {"lr_lambdas": [value]}})


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "{}", '{"tuple": [1], "list": []}', '{"os.system": "x"}', '{"dtype": "nn.Module"}'),
        *('{"tensor": "other"}', '{"array": ["O", [1], "x"]}', '{"defaultdict": [[], "eval"]}', '{"int": "1+1"}'),
        "[" * 100_000,
    ],
)
def test_what_is_no_such_text_is_an_error_and_nothing_else(text):
    data = torch.frombuffer(bytearray(text, "ascii") or bytearray(b" "), dtype=torch.uint8)
    with pytest.raises(Exception) as caught:  # noqa: PT011 (any will do)
        unflatten({TEXT: data, "x": torch.zeros(8, dtype=torch.uint8)})
    assert isinstance(caught.value, ValueError | KeyError | TypeError | RecursionError)
