"""From a batch's gradient to the next weights: checked, clipped, applied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.errors import UserError
from dtrain.schema.sections import Fit

from ..checks.optimizer_kinds import needs_closure, refused_without_closure
from ..distributed.torch_private import clamp_, multiply_
from ..strategies.base import Parallel, has_sparse_gradients
from .precision import Precision
from .regularization import Penalty

_NO_LIMIT = (
    "fit.clip_value clips each gradient element, which torch can't do for sparse or complex gradients: use clip_norm, "
    "or Embedding(sparse=False)"
)


class Update:
    """An optimizer's step. All ranks see the same gradients, or the same norm of them, and so decide alike.

    Args:
        fit: of it, `clip_norm`: the gradients' Euclidean norm, over all parameters, is scaled down to it where it is
            larger; `clip_value`: each gradient's every number is limited to it, up and down; `l1`, `l2`: see
            `Penalty`, a part of the gradient that is clipped; `on_nonfinite`: what to do with a batch whose gradients
            hold inf or nan, end the run or leave it out.
        report: called for each batch that was skipped.

    Raises:
        UserError: an optimizer that makes its gradients itself, as LBFGS does, with any of it; or gradients whose
            numbers can't be limited or added to one by one.
    """

    def __init__(
        self,
        model: Parallel,
        optimizer: Optimizer,
        precision: Precision,
        fit: Fit,
        report: Callable[[str], None] = print,
    ) -> None:
        names = ("clip_norm", "clip_value", "l1", "l2", "on_nonfinite")
        asked = {f"fit.{name}": getattr(fit, name) for name in names} | {"fit.precision: fp16": precision.scaler}
        given = [name for name, value in asked.items() if value is not None]
        if given and needs_closure(optimizer):
            name = type(optimizer).__name__
            raise UserError(
                f"{name} computes the gradient several times a step, so {', '.join(given)} can't be used with it"
            )
        is_sparse = any(map(has_sparse_gradients, (model.bare, model.loss.module)))
        if fit.clip_value is not None and (is_sparse or any(p.is_complex() for p in model.trained(optimizer))):
            raise UserError(_NO_LIMIT)
        self._model = model
        self._optimizer = optimizer
        self._scaler = precision.scaler
        self._clip_norm = fit.clip_norm
        self._clip_value = fit.clip_value
        self._penalty = Penalty(model.bare, fit.l1, fit.l2)
        self._on_nonfinite = fit.on_nonfinite
        self._report = report

    @property
    def may_skip(self) -> bool:
        """Whether batches are left out, of which the epoch's loss and metrics are to know nothing either."""
        return self._on_nonfinite == "skip"

    def apply(self, step: int, optimizer: Optimizer | None = None) -> bool:
        """Make the optimizer's step number `step`; False where `on_nonfinite` leaves it out. All ranks take part.

        Args:
            optimizer: the one of several whose gradient it is.

        Raises:
            UserError: the gradients are not finite, and `on_nonfinite` is stop.
        """
        optimizer = self._optimizer if optimizer is None else optimizer
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
        self._penalty.add()
        gradients = self._model.gradients(optimizer)
        if self._clip_norm is not None or self._on_nonfinite is not None:
            norm = self._model.norm(gradients)
            if self._on_nonfinite is not None and self._leaves_out(norm, step):
                return False
            if self._clip_norm is not None and gradients:
                scale = torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0)
                multiply_(gradients, scale.to(gradients[0].device))  # which may be offloaded
        if self._clip_value is not None and gradients:
            if any(gradient.is_sparse or gradient.is_complex() for gradient in gradients):
                raise UserError(_NO_LIMIT)  # one that functional.embedding has made
            clamp_(gradients, self._clip_value)
        if self._scaler is not None:
            self._scaler.step(optimizer)
            self._scaler.update()
            return True
        try:
            is_done = self._model.step(optimizer)
        except Exception as error:  # an optimizer of the user's own may raise anything
            if (refused := refused_without_closure(optimizer, error)) is not None:
                raise refused from error
            raise
        if not is_done:
            self._report_skipped(step)
        return is_done

    def _leaves_out(self, norm: Tensor, step: int) -> bool:
        if bool(torch.isfinite(norm)):
            return False
        if self._on_nonfinite == "stop":
            raise UserError(
                f"the gradients of step {step} are not finite, their norm is {float(norm)}; a smaller learning rate "
                "or fit.clip_norm may help, and fit.on_nonfinite: skip skips such batches"
            )
        self._report_skipped(step)
        self._model.drop_gradients()
        if self._scaler is not None:
            self._scaler.update()
        return True

    def _report_skipped(self, step: int) -> None:
        self._report(f"step {step} is skipped: its gradients are not finite")
