"""A metric that is a plain function of all samples at once, as scikit-learn's are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from dtrain.errors import UserError, first_line

from ..data.batch_samples import is_by_rows, num_samples
from ..data.batch_tensors import map_tensors, merge_members
from ..loss.step import describe


class FunctionMetric(Metric):
    """A function `f(predictions, target)` of all samples at once: of an epoch, over all ranks, in their order.

    Tensors come on the CPU, joined along their first dimension. Dicts and tuples are joined entry by entry. A list has
    an entry for each sample (strings, say, or tensors of several shapes), and those of all batches make one; or it has
    tensors with a row for each sample, as default_collate makes of samples that hold a tuple, and is joined as a tuple.

    Attributes:
        samples: of the next update; without it they are counted.
    """

    batches: list[tuple[int, tuple[Any, ...], dict[str, Any]]]  # how many samples, and what of them

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.samples: int | None = None
        self.add_state("batches", default=[], dist_reduce_fx=None)

    def update(self, *args: Any, **kwargs: Any) -> None:
        samples = self.samples if self.samples is not None else num_samples((args, kwargs)) or len(args[0])
        self.batches.append((samples, args, kwargs))

    def compute(self) -> Any:
        if not self.batches:
            raise ValueError("no samples")
        sizes = [samples for samples, *_ in self.batches]
        args = joined([args for _, args, _ in self.batches], sizes)
        kwargs = joined([kwargs for *_, kwargs in self.batches], sizes)
        return self.function(*args, **kwargs)


def joined(pieces: Sequence[Any], sizes: Sequence[int]) -> Any:
    """What all samples would be in one batch, made of batches of those sizes.

    Raises:
        UserError: there is no telling.
    """
    first = pieces[0]
    if any(type(piece) is not type(first) for piece in pieces):
        raise UserError(f"batches hold different things: {' and '.join(sorted({describe(each) for each in pieces}))}")
    if isinstance(first, Tensor):
        return _rows(pieces, sizes)
    if isinstance(first, np.ndarray):
        return np.concatenate(pieces)
    if first is None:
        return None
    if isinstance(first, list) and not _has_rows(pieces, sizes):
        return map_tensors(Tensor.cpu, [sample for piece in pieces for sample in piece])
    if isinstance(first, Mapping):
        if any(piece.keys() != first.keys() for piece in pieces):
            raise UserError("batches hold dicts with different keys; a list with a dict for each sample can be joined")
        pieces = [first, *({key: piece[key] for key in first} for piece in pieces[1:])]
    merged = merge_members(lambda members: joined(members, sizes), pieces)
    if merged is None:
        raise UserError(f"{describe(first)} of each batch can't be joined; a list with an entry for each sample can")
    return merged


def _rows(pieces: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    if any(piece.ndim == 0 and size != 1 for piece, size in zip(pieces, sizes, strict=True)):
        raise UserError("one number of a batch can't be joined with others; a tensor with a row for each sample can")
    try:
        return torch.cat([piece.cpu() if piece.ndim else piece.cpu()[None] for piece in pieces])
    except RuntimeError as error:
        mend = "a list with a tensor for each sample can"
        raise UserError(f"tensors of {_shapes(pieces)} can't be joined: {first_line(error)}; {mend}") from None


def _shapes(pieces: Sequence[Tensor]) -> str:
    return " and ".join(sorted({str(list(piece.shape)) for piece in pieces})[:2])


def _has_rows(pieces: Sequence[list[Any]], sizes: Sequence[int]) -> bool:
    """Whether lists hold tensors with a row for each sample, rather than an entry for each sample."""
    pairs = list(zip(pieces, sizes, strict=True))
    if not all(_are_rows(piece, size) for piece, size in pairs) or len({len(piece) for piece in pieces}) > 1:
        return False
    if any(len(piece) != size for piece, size in pairs):
        return True
    raise UserError(
        f"a list of {len(pieces[0])} tensors, each with {sizes[0]} rows, of {sizes[0]} samples: it can't be told "
        "whether the list has one entry per sample or each tensor one row; in the latter case use a tuple"
    )


def _are_rows(piece: list[Any], size: int) -> bool:
    return is_by_rows(piece, size) and not isinstance(piece[0], Mapping)
