"""The states of sums and metrics brought together on rank 0, however many there are, in a few collectives.

torchmetrics synchronises each state by itself; here all of them share one exchange of shapes, one reduce for
the integer sums, one for the floating sums, and one gather for everything else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

Value: TypeAlias = "Tensor | list[Tensor]"
Reduction = Literal["sum", "max", "min", "cat", "stack"]
Header = list[list[tuple[torch.dtype, tuple[int, ...]]]]  # for each state, what a rank contributes to it


@dataclass
class State:
    """What one rank knows of a value that belongs to all of them.

    Attributes:
        value: a tensor, or a list of tensors of any dtypes and shapes, possibly empty.
        reduction: "sum", "max" and "min" are elementwise. A tensor that is "stack" becomes [W, ...] over
            the W ranks that are `updated`; with one of them it stays as it is, as in a single process. A list
            has "stack", which keeps its elements apart, or "cat", which joins those of one rank along dim 0.
        updated: whether `value` has seen any sample. Where it has not, only a sum looks at it.
        combine: is given the stack, where there is one, and returns what is to stand for it.
    """

    value: Value
    reduction: Reduction
    updated: bool = True
    combine: Callable[[Tensor], Tensor] | None = None


def reduce_states(states: Sequence[State], group: dist.ProcessGroup | None = None) -> list[Value] | None:
    """The value of each state over all ranks, on rank 0 of the group; None on the others.

    All ranks of the group take part, with the same states in the same order. A world of one, or none, gets
    its own values back without a collective. Sums stay on their device; all else, in the order of the ranks,
    arrives where the group communicates: on the CPU under gloo, on the GPU under NCCL.

    Integer sums are exact. Floating sums are added in float64 and rounded once to their own dtype; since each
    rank has rounded its own part before, they equal a single process's to rounding, not to the bit.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [state.value for state in states]
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    parts = [_contribution(state) for state in states]
    headers = _exchange(parts, group)
    sums = _reduce_sums(states, headers, device, group)
    others = [i for i in range(len(states)) if i not in sums]
    gathered = _gather([parts[i] for i in others], [[h[i] for i in others] for h in headers], device, group)
    if dist.get_rank(group) != 0:
        return None
    merged: dict[int, Value] = dict(sums)
    for i, pieces in zip(others, gathered, strict=True):
        merged[i] = _merged(states[i], pieces)
    return [merged[i] for i in range(len(states))]


def _contribution(state: State) -> list[Tensor]:
    if isinstance(state.value, Tensor):
        return [state.value] if state.updated or state.reduction == "sum" else []
    if not all(isinstance(piece, Tensor) for piece in state.value):
        raise TypeError("a list that holds anything but tensors cannot be gathered over ranks")
    if state.reduction == "cat" and state.value:  # one piece a rank, instead of one for each update
        return [torch.cat([piece if piece.ndim else piece[None] for piece in state.value])]
    return state.value


def _exchange(parts: Sequence[Sequence[Tensor]], group: dist.ProcessGroup | None) -> list[Header]:
    """Each rank's dtypes and shapes, on all ranks. All ranks take part.

    Sums need it too: the first update may have changed a state's dtype or shape, and a rank without any
    sample would then enter the reduce with another length than the rest.
    """
    headers: list[Header] = [[] for _ in range(dist.get_world_size(group))]
    own = [[(piece.dtype, tuple(piece.shape)) for piece in pieces] for pieces in parts]
    dist.all_gather_object(headers, own, group=group)
    return headers


def _reduce_sums(
    states: Sequence[State], headers: Sequence[Header], device: torch.device, group: dist.ProcessGroup | None
) -> dict[int, Tensor]:
    """The sums by position, valid on rank 0: a reduce for int64, one for float64. All ranks take part."""
    agreed: dict[torch.dtype, dict[int, tuple[torch.dtype, torch.Size]]] = defaultdict(dict)
    for i, state in enumerate(states):
        if state.reduction == "sum":
            dtypes, shapes = zip(*(header[i][0] for header in headers), strict=True)
            dtype = _promoted(dtypes)
            is_integer = not (dtype.is_floating_point or dtype.is_complex)
            wire = torch.int64 if is_integer else torch.promote_types(dtype, torch.float64)
            agreed[wire][i] = dtype, torch.broadcast_shapes(*shapes)

    sums: dict[int, Tensor] = {}
    for wire, members in agreed.items():
        values = [_tensor(states[i]).to(device, wire).expand(shape) for i, (_, shape) in members.items()]
        buffer = torch.cat([value.reshape(-1) for value in values])
        dist.reduce(buffer, group_dst=0, group=group)
        flat = buffer.split_with_sizes([value.numel() for value in values])
        for (i, (dtype, shape)), piece in zip(members.items(), flat, strict=True):
            sums[i] = piece.view(shape).to(_tensor(states[i]).device, dtype)
    return sums


def _promoted(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def _tensor(state: State) -> Tensor:
    if isinstance(state.value, Tensor):
        return state.value.detach()
    raise TypeError(f"a list cannot be reduced by {state.reduction!r}: use cat or stack")


def _gather(
    parts: Sequence[Sequence[Tensor]],
    headers: Sequence[Header],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> list[list[Tensor]]:
    """For each state the pieces of all ranks, rank by rank, on rank 0; empty elsewhere. All ranks take part.

    The pieces travel as bytes, so that one gather serves every dtype. A gather wants equal lengths: all are
    padded to the longest. When no rank has any, which all of them see in the headers, none calls it.
    """
    sizes = [sum(_num_bytes(*piece) for pieces in header for piece in pieces) for header in headers]
    buffer = torch.empty(max(sizes), dtype=torch.uint8, device=device)
    received: list[Tensor] | None = None
    if dist.get_rank(group) == 0:
        received = [torch.empty_like(buffer) for _ in headers]
    if max(sizes):
        _pack([piece for pieces in parts for piece in pieces], buffer)
        dist.gather(buffer, received, group=group, group_dst=0)
    unpacked = [_unpack(*pair) for pair in zip(received or [], headers, strict=False)]
    return [[piece for rank in unpacked for piece in rank[i]] for i in range(len(parts))]


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _pack(pieces: Sequence[Tensor], buffer: Tensor) -> None:
    flat = [piece.detach().to(buffer.device).reshape(-1).view(torch.uint8) for piece in pieces]
    if flat:
        packed = torch.cat(flat)
        buffer[: len(packed)] = packed


def _unpack(buffer: Tensor, header: Header) -> list[list[Tensor]]:
    sizes = [_num_bytes(*piece) for pieces in header for piece in pieces]
    raw = iter(buffer[: sum(sizes)].split_with_sizes(sizes))
    # The clone is aligned, as a view of another dtype must be.
    return [[next(raw).clone().view(dtype).view(shape) for dtype, shape in pieces] for pieces in header]


def _merged(state: State, pieces: list[Tensor]) -> Value:
    if isinstance(state.value, list):
        return pieces
    if len(pieces) < 2:
        return pieces[0] if pieces else state.value
    stacked = torch.stack(pieces)
    # Not a collective's own maximum: those lose a NaN, which torch keeps.
    if state.reduction == "max":
        return stacked.amax(0)
    if state.reduction == "min":
        return stacked.amin(0)
    return state.combine(stacked) if state.combine else stacked
