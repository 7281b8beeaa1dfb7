"""DeepSpeed's inner parts, all that are used here. tests/house/test_private_parts.py covers upgrades.

What a checkpoint needs, DeepSpeed has public functions for: `safe_get_full_*` and `safe_set_full_*` in
deepspeed.utils. They were tried (0.19.8), and don't do: before the first step there is no state that could be set, and
a run is continued then (`argument of type 'NoneType' is not iterable`, `KeyError: 'exp_avg'`); in stage 3 no parameter
can be set whose numbers don't divide by the ranks; and they know only float32, in a sum that turns -0 into 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Fragment:
    """What of a parameter this rank's optimizer has: `length` of its numbers from `begin` on, at `flat[start]` on.

    `flat` is what the optimizer trains: float32 numbers of a group's parameters, one after the other.
    """

    flat: Tensor
    start: int
    begin: int
    length: int


class ZeroOptimizer:
    """DeepSpeed's wrapper around an optimizer, as one of its engines of stages 1 to 3 has it."""

    def __init__(self, engine: Any, stage: int) -> None:
        self._zero = engine.optimizer
        self._stage = stage

    @property
    def optimizer(self) -> Any:
        """The optimizer that it steps with: the one that it was given, or one of its own."""
        return self._zero.optimizer

    @property
    def is_offloaded(self) -> bool:
        """Whether the optimizer's state, and so the gradients, are in the CPU's memory."""
        return bool(self._zero.offload_optimizer if self._stage == 3 else self._zero.cpu_offload)

    def gradients(self) -> list[Tensor]:
        """This rank's parts, to be changed in place: `safe_get_full_grad` gives whole ones, which are copies."""
        return [part for parts in self._zero.averaged_gradients.values() for part in parts]

    def take_weights(self) -> None:
        """Have the optimizer's float32 weights be what the model's parameters are now, all at once."""
        self._zero.refresh_fp32_params()

    def fragments(self, parameters: Sequence[nn.Parameter], rank: int) -> Iterator[tuple[nn.Parameter, Fragment]]:
        """Where this rank's optimizer has its part of each parameter."""
        zero = self._zero
        if self._stage == 3:  # each rank has as many numbers of each parameter; the last ones' end is padding
            for parameter in parameters:
                number, start, length = zero.grad_position[zero.get_param_id(parameter)]
                numel = whole_shape(parameter).numel()
                begin = min(rank * length, numel)
                flat = zero.fp32_partitioned_groups_flat[number]
                yield parameter, Fragment(flat, start, begin, min(length, numel - begin))
            return
        # A group's parameters stand in a row, which is cut into as many parts as there are ranks.
        groups = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, strict=True)
        for flat, (members, offsets) in zip(zero.single_partition_of_fp32_groups, groups, strict=True):
            first, end = rank * flat.numel(), (rank + 1) * flat.numel()
            for parameter, offset in zip(members, offsets, strict=True):
                here = min(max(offset, first), end)
                length = max(min(offset + parameter.numel(), end) - here, 0)
                yield parameter, Fragment(flat, here - first, here - offset if length else 0, length)


def is_cut(value: Tensor) -> bool:
    """Whether ranks have parts of it (stage 3), and `GatheredParameters` brings them together."""
    return hasattr(value, "ds_id")


def whole_shape(value: Tensor) -> torch.Size:
    """Its shape without the cut: of what is cut, torch's own is that of nothing."""
    return torch.Size(getattr(value, "ds_shape", value.shape))


def leave_out_shm(deepspeed: Any) -> None:
    """Have it exchange tensors of CPU ranks as torch does: its own way is compiled on first use, for half a minute."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
