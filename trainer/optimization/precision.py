"""The precision of the model's computations: torch's autocast and gradient scaler behind one setting."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from dtrain.errors import UserError

from ..data.batch_tensors import map_tensors
from ..data.indexed import MicroBatch
from ..loss.step import Outcome, Step
from ..loss.user_step import LossByLoss

T = TypeVar("T")
Name = Literal["fp32", "tf32", "bf16", "fp16"]
_COARSE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How forward and backward passes are computed. Weights, gradients and the optimizer's state are float32 in all.

    fp32: as the tensors are; torch's own default rounds to TF32 in convolutions and RNNs. tf32: matrix products,
    convolutions and RNNs of CUDA with 10 bits of mantissa, 8 times as fast. bf16, fp16: autocast, which computes
    products in 16 bits and what needs it (losses, norms) in 32. fp16 has a small range, so that its loss is scaled up
    before the backward pass, by a factor that adapts (Micikevicius et al., Mixed Precision Training, ICLR 2018); a step
    whose gradients overflow is left out.

    Args:
        gradients_on: where the optimizer finds the gradients, if not on `device`.

    Raises:
        UserError: fp16 on a CPU.
    """

    def __init__(self, name: Name, device: torch.device, gradients_on: torch.device | None = None) -> None:
        if name == "fp16" and device.type == "cpu":
            raise UserError("fit.precision: fp16 needs a GPU; on the CPU use bf16")
        self.name = name
        self._device = device.type
        self.dtype = _COARSE.get(name)  # of autocast, if any
        self.scaler = _scaler(gradients_on or device) if name == "fp16" else None

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """In the block, CUDA computes float32 with this precision; then as before, for whatever the process does next.

        Around the backward pass too, which looks at torch's flags for itself.
        """
        before = [each.fp32_precision for each in _FLAGS]
        # The older names first, which set the newer ones. In a script that has set newer ones they can't be read.
        older = _read(torch.get_float32_matmul_precision), _read(lambda: torch.backends.cudnn.allow_tf32)
        _set_float32("tf32" if self.name == "tf32" else "ieee")
        try:
            yield
        finally:
            _set_older(*older)
            for each, value in zip(_FLAGS, before, strict=True):
                each.fp32_precision = value

    def of(self, step: Step) -> Step:
        """The step, computed with this precision, in training and evaluation. What it finds is float32 again."""
        if self.dtype is None:
            return step

        def computed(step: Step) -> Step:
            @functools.wraps(step)
            def computed_step(model: nn.Module, micro_batch: MicroBatch) -> Outcome:
                with torch.autocast(self._device, self.dtype):
                    outcome = step(model, micro_batch)
                return replace(outcome, predictions=map_tensors(_widened, outcome.predictions))

            return computed_step

        return step.computed_by(computed) if isinstance(step, LossByLoss) else computed(step)

    def scaled(self, loss: Tensor) -> Tensor:
        """What the backward pass begins with."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def state_dict(self) -> dict[str, Any] | None:
        return None if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if self.scaler is not None and state is not None:
            self.scaler.load_state_dict(state)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _COARSE.values() else tensor


def _scaler(device: torch.device) -> torch.amp.GradScaler:
    """A scaler whose scale is on that device, whatever the loss is on.

    For gradients on the CPU it would copy a scale on the GPU without waiting, and read what is still in flight.
    """
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.zeros((), device=device))  # the first number decides where the scale is
    return scaler


_BACKENDS: Any = torch.backends  # of which mypy does not see all
_IS_NEW = hasattr(_BACKENDS, "fp32_precision")  # torch 2.9
_CUDNN = [_BACKENDS.cudnn.conv, _BACKENDS.cudnn.rnn] if _IS_NEW else []
_FLAGS = [_BACKENDS.cuda.matmul, _BACKENDS.mkldnn.matmul, *_CUDNN] if _IS_NEW else []


def is_tf32_asked_for() -> bool:
    """Whether the process has set torch's flags so that matrix products are rounded, which they are not by default."""
    return any(each.fp32_precision == "tf32" for each in _FLAGS[:1]) or _read(torch.get_float32_matmul_precision) in (
        "high",
        "medium",
    )


def _set_float32(value: Literal["ieee", "tf32"]) -> None:
    """How CUDA multiplies float32, by the older names too, which users' code and torch.compile read."""
    _set_older("high" if value == "tf32" else "highest", value == "tf32")
    for each in _CUDNN:  # over torch.backends.fp32_precision
        each.fp32_precision = value


def _set_older(matmul: str | None, cudnn: bool | None) -> None:
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    if cudnn is not None:
        torch.backends.cudnn.allow_tf32 = cudnn


def _read(flag: Callable[[], T]) -> T | None:
    """The flag, where torch can tell it."""
    try:
        return flag()
    except RuntimeError:
        return None
