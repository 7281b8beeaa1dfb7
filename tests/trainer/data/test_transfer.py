"""A batch's tensors brought to a device, whatever holds them; the meta device stands for a GPU."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_sequence

from dtrain.errors import UserError
from dtrain.trainer.data.batch_samples import is_by_rows, num_samples
from dtrain.trainer.data.batch_tensors import map_tensors, tensors
from dtrain.trainer.data.transfer import _stream_of_copies, to_device

META = torch.device("meta")


class Point(collections.namedtuple("Point", "x y")):
    pass


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    x: Tensor
    name: str = "a"


@attrs.frozen
class Declared:
    x: Any


class Attributes(dict):  # items that are attributes as well
    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__ = self


class Own:
    """Moves itself, in place, and hides its tensor from everybody else."""

    def __init__(self) -> None:
        self.x = torch.ones(2)

    def to(self, device: torch.device) -> None:
        self.x = self.x.to(device)


class Encoding(collections.UserDict):
    def to(self, device: torch.device, *, non_blocking: bool = False) -> Encoding:
        assert non_blocking
        return Encoding({key: value.to(device) for key, value in self.data.items()})


def ones() -> Tensor:
    return torch.ones(2)


NESTINGS: dict[str, tuple[Any, Any]] = {
    "namedtuple": (Point(ones(), [ones()]), lambda b: [b.x, b.y[0]]),
    "dataclass": ({"r": Record(ones())}, lambda b: [b["r"].x]),
    "attrs": (Declared((ones(), 3)), lambda b: [b.x[0]]),
    "attributes": (Attributes(x=ones()), lambda b: [b.x, b["x"]]),
    "subclasses": (type("D", (dict,), {})(x=type("L", (list,), {})([ones()])), lambda b: [b["x"][0]]),
    "defaultdict": (collections.defaultdict(list, x=[ones()]), lambda b: [b["x"][0]]),
    "UserDict": (collections.UserDict(x=ones()), lambda b: [b["x"]]),
    "mappingproxy": (types.MappingProxyType({"x": ones()}), lambda b: [b["x"]]),
    "deque": (collections.deque([ones()]), lambda b: [b[0]]),
    "returned": (torch.max(torch.ones(2, 2), 1), lambda b: [b.values, b.indices]),
    "own": ((Own(), "text", None), lambda b: [b[0].x]),
    "own without a wait": (Encoding({"x": ones()}), lambda b: [b["x"]]),
    "packed": (pack_sequence([torch.ones(3), torch.ones(2)]), lambda b: [b.data]),
}


@pytest.mark.parametrize("kind", NESTINGS)
def test_whatever_holds_tensors_is_moved_and_stays_what_it_is(kind):
    batch, found = NESTINGS[kind]
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert all(tensor.is_meta for tensor in found(moved))
    if "own" not in kind:
        assert not any(tensor.is_meta for tensor in tensors(batch))


class Streams:
    """Stand for torch.cuda's, in the order in which they are used."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[Any] = []
        self.current = types.SimpleNamespace(wait_stream=lambda other: self.calls.append(("waits for", other)))
        patch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(torch.cuda, "Stream", lambda device: "beside")
        patch.setattr(torch.cuda, "stream", self.entered)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: self.calls.append((tensor.device.type, stream)))
        _stream_of_copies.cache_clear()

    @contextlib.contextmanager
    def entered(self, stream: str) -> Iterator[None]:
        self.calls.append(("copies on", stream))
        yield


def test_copies_to_a_gpu_are_made_beside_the_kernels(monkeypatch):
    """On a card, tests/gpu/speed.py sees that they are."""
    streams = Streams(monkeypatch)
    gpu = torch.device("cuda", 0)
    with FakeTensorMode():
        to_device([{"x": ones()}, (ones(), "text", Encoding({"x": ones()}))], gpu)
        assert streams.calls == [("copies on", "beside"), ("waits for", "beside"), *[("cuda", streams.current)] * 3]
        streams.calls.clear()
        to_device([ones(), Own()], gpu)  # of whose tensors nobody knows
    assert not streams.calls
    _stream_of_copies.cache_clear()


def test_lengths_of_packed_sequences_stay_on_the_cpu():
    packed = to_device({"text": pack_sequence([torch.ones(3), torch.ones(2)])}, META)["text"]
    assert packed.batch_sizes.device.type == "cpu"
    assert num_samples((3, "text", packed)) == 2


class Hiding:
    def __init__(self) -> None:
        self.inner = [ones()]


class Slotted:
    __slots__ = ("inner",)

    def __init__(self) -> None:
        self.inner = ones()


class Stubborn(dict):
    def __setitem__(self, key: str, value: Any) -> None:
        raise KeyError("it is as it is")


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ([Hiding()], "a batch holds a Hiding, whose tensors can't be moved to meta: give it a method to"),
        ({"x": Slotted()}, "a batch holds a Slotted"),
        ({"x": {ones()}}, "a batch holds a set"),
        (Stubborn(x=ones()), "a Stubborn can't be rebuilt with other tensors: KeyError: 'it is as it is'"),
    ],
)
def test_what_can_not_be_moved_is_refused_not_left_behind(batch, says):
    with pytest.raises(UserError, match=says):
        to_device(batch, META)
    assert to_device(batch, torch.device("cpu")) is batch


def test_what_holds_no_tensor_is_handed_on_and_rows_are_seen():
    batch = {"names": ["a", "b"], "shape": torch.Size([2])}
    assert map_tensors(torch.neg, batch) is batch
    assert not is_by_rows(batch, 2)
    assert is_by_rows([Record(ones()), batch], 2)
    assert not is_by_rows([Record(ones()), torch.ones(3)], 2)
    assert not is_by_rows([Record(ones()), torch.tensor(3)], 2)
