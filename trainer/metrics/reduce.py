"""Combines the states of sums and metrics on rank 0, however many there are, in a few collectives.

torchmetrics synchronises each state by itself; here all of them share one exchange of shapes, one reduce for
the integer sums, one for the floating sums, and one gather for everything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batch_tensors import map_tensors, tensors

Value: TypeAlias = "Tensor | list[Any]"
Reduction = Literal["sum", "max", "min", "stack"]


class Part(NamedTuple):
    """What a rank contributes to a state: pieces, and the number of the batch that each of them is from."""

    batches: Sequence[int]
    pieces: Sequence[Any]


Header = list[Part]  # for each state a rank's part, with meta tensors: of the same dtypes and shapes, without numbers


@dataclass
class LocalState:
    """What one rank knows of a value that belongs to all of them.

    Attributes:
        value: a tensor, or a list, possibly empty, of tensors of any dtypes and shapes, of whatever else pickles
            (strings), or of nestings of such, as `map_tensors` knows them.
        reduction: "sum", "max" and "min" are elementwise. A tensor that is "stack" becomes [W, ...] over
            the W ranks that are `updated`; with one of them it stays as it is, as in a single process. Lists are
            always "stack": those of all ranks make one.
        updated: whether `value` has seen any sample. Where it has not, only a sum looks at it.
        combine: is given the stack, where there is one, and returns what is to stand for it.
        batches: for each element of a list, the number of the batch that it is from. Batch by batch, and in each
            rank by rank, the elements come in the order of a single process, since each batch is cut over the ranks.
    """

    value: Value
    reduction: Reduction
    updated: bool = True
    combine: Callable[[Tensor], Tensor] | None = None
    batches: Sequence[int] = ()


def reduce_states(states: Sequence[LocalState], group: dist.ProcessGroup | None = None) -> list[Value] | None:
    """The value of each state over all ranks, on rank 0 of the group; None on the others.

    All ranks of the group take part, with the same states in the same order. A world of one, or none, gets
    its own values back without a collective. Sums stay on their device; all else
    arrives on the CPU, or on the GPU where the script's own group is NCCL's alone.

    Integer sums are exact. Floating sums are added in float64 and rounded once to their own dtype; since each
    rank has rounded its own part before, they equal a single process's to rounding, not to the bit.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [state.value for state in states]
    # In the CPU's memory where that can be exchanged: all ranks' samples may be more than rank 0's GPU has room for.
    device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")
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


def _contribution(state: LocalState) -> Part:
    if isinstance(state.value, Tensor):
        return Part([0], [state.value]) if state.updated or state.reduction == "sum" else Part([], [])
    return Part(state.batches or [0] * len(state.value), state.value)


def _exchange(parts: Sequence[Part], group: dist.ProcessGroup | None) -> list[Header]:
    """Each rank's dtypes and shapes, and what is no tensor, on all ranks. All ranks take part.

    Sums need it too: the first update may have changed a state's dtype or shape, and a rank without any
    sample would then enter the reduce with another length than the rest.
    """
    outlines: dict[tuple[torch.dtype, torch.Size], Tensor] = {}  # an object pickled again takes a few bytes

    def outline(tensor: Tensor) -> Tensor:
        kind = tensor.dtype, tensor.shape
        return outlines.setdefault(kind, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    headers: list[Header] = [[] for _ in range(dist.get_world_size(group))]
    own = [Part(part.batches, map_tensors(outline, part.pieces)) for part in parts]
    dist.all_gather_object(headers, own, group=group)
    return headers


def _reduce_sums(
    states: Sequence[LocalState], headers: Sequence[Header], device: torch.device, group: dist.ProcessGroup | None
) -> dict[int, Tensor]:
    """The sums by position, valid on rank 0: a reduce for int64, one for float64. All ranks take part."""
    agreed: dict[torch.dtype, dict[int, tuple[torch.dtype, torch.Size]]] = defaultdict(dict)
    for i, state in enumerate(states):
        if state.reduction == "sum":
            outlines = [header[i].pieces[0] for header in headers]
            dtype = _promoted([outline.dtype for outline in outlines])
            is_integer = not (dtype.is_floating_point or dtype.is_complex)
            wire = torch.int64 if is_integer else torch.promote_types(dtype, torch.float64)
            agreed[wire][i] = dtype, torch.broadcast_shapes(*(outline.shape for outline in outlines))

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


def _tensor(state: LocalState) -> Tensor:
    if isinstance(state.value, Tensor):
        return state.value.detach()
    raise TypeError(f"a list cannot be reduced by {state.reduction!r}: use stack")


def _gather(
    parts: Sequence[Part],
    headers: Sequence[Header],
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> list[list[Any]]:
    """For each state the pieces of all ranks, in the order of their batches, on rank 0. All ranks take part.

    Tensors travel as bytes, so that one gather serves every dtype. A gather wants equal lengths: all are
    padded to the longest. When no rank has any, which all of them see in the headers, none calls it.
    """
    sizes = [sum(outline.nbytes for part in header for outline in tensors(part.pieces)) for header in headers]
    buffer = torch.empty(max(sizes), dtype=torch.uint8, device=device)
    received: list[Tensor] | None = None
    if dist.get_rank(group) == 0:
        received = [torch.empty_like(buffer) for _ in headers]
    if max(sizes):
        _pack([tensor for part in parts for tensor in tensors(part.pieces)], buffer)
        dist.gather(buffer, received, group=group, group_dst=0)
    unpacked = [_unpack(*pair) for pair in zip(received or [], headers, strict=False)]
    return [list(by_batch([rank[i] for rank in unpacked]).pieces) for i in range(len(parts))]


def _pack(packed_tensors: Sequence[Tensor], buffer: Tensor) -> None:
    flat = [each.detach().to(buffer.device).reshape(-1).view(torch.uint8) for each in packed_tensors]
    if flat:
        packed = torch.cat(flat)
        buffer[: len(packed)] = packed


def _unpack(buffer: Tensor, header: Header) -> list[Part]:
    sizes = [outline.nbytes for part in header for outline in tensors(part.pieces)]
    raw = iter(buffer[: sum(sizes)].split_with_sizes(sizes))

    def filled(outline: Tensor) -> Tensor:
        # The clone is aligned, as a view of another dtype must be.
        return next(raw).clone().view(outline.dtype).view(outline.shape)

    return [Part(part.batches, map_tensors(filled, part.pieces)) for part in header]


def by_batch(parts: Sequence[Part]) -> Part:
    """The parts of ranks 0, 1, ... as one, in the order of a single process: batch by batch."""
    pairs = [pair for part in parts for pair in zip(part.batches, part.pieces, strict=True)]
    pairs.sort(key=lambda pair: pair[0])  # stable: in each batch, rank by rank
    return Part([batch for batch, _ in pairs], [piece for _, piece in pairs])


def _merged(state: LocalState, pieces: list[Any]) -> Value:
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
