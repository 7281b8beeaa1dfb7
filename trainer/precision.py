"""With how many bits the model computes: torch's autocast and gradient scaler behind one word."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtrain.errors import UserError

from .data import MicroBatch
from .step import Outcome, Step
from .transfer import map_tensors

Name = Literal["fp32", "tf32", "bf16", "fp16"]
_COARSE = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """How forward and backward passes are computed. Weights, gradients and the optimizer's state are float32 in all.

    fp32: as the tensors are. tf32: matrix products and convolutions of CUDA with 10 bits of mantissa, 8 times as fast.
    bf16, fp16: autocast, which computes products in 16 bits and what needs it (losses, norms) in 32. fp16 has a
    small range, so that its loss is scaled up before the backward pass, by a factor that adapts (Micikevicius et al.,
    Mixed Precision Training, ICLR 2018); a step whose gradients overflow is left out.

    Raises:
        UserError: fp16 on a CPU.
    """

    def __init__(self, name: Name, device: torch.device) -> None:
        if name == "fp16" and device.type == "cpu":
            raise UserError("fit.precision: fp16 is for GPUs; on a CPU bf16 does the same without a scaler")
        if name == "tf32":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]  # unseen by mypy
        self.name = name
        self._device = device.type
        self.dtype = _COARSE.get(name)  # of autocast, if any
        self.scaler = torch.amp.GradScaler(device.type) if name == "fp16" else None

    def of(self, step: Step) -> Step:
        """The step, computed with this precision, in training and evaluation. What it finds is float32 again."""
        if self.dtype is None:
            return step

        @functools.wraps(step)
        def computed(model: nn.Module, micro_batch: MicroBatch) -> Outcome:
            with torch.autocast(self._device, self.dtype):
                outcome = step(model, micro_batch)
            return replace(outcome, predictions=map_tensors(_widened, outcome.predictions))

        return computed

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
