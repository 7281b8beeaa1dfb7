"""Stochastic weight averaging (Izmailov et al., 2018): the equal average of the weights at several moments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.errors import UserError
from dtrain.run.folder import RunDir
from dtrain.schema.interval import Interval
from dtrain.stderr import say

from ..checks.optimizer_kinds import judged
from ..distributed.torch_private import BATCH_NORMS
from ..fit.callbacks import FitContext
from ..model.buffers import copies_of, put_back
from ..model.weights import bare_state_dict, save_weights


class WeightAveraging:
    """Averages the weights after `start`, and after each `every` from then on; at the end it writes weights/swa.pt.

    The training knows nothing of it. Batch norm's statistics, which are not those of any of these moments, are computed
    anew at the end, as by torch.optim.swa_utils.update_bn: over an epoch of the training data, of rank 0's share.
    Other buffers are as at the end. Rank 0 has the average, and has it in checkpoints.

    Args:
        start: a number of optimizer steps, or text such as "10 epochs".
        every: "epoch", or as `start`.
    """

    def __init__(self, start: int | str, every: int | str = "epoch") -> None:
        self._start, self._every = _interval("start", start), _interval("every", every)
        self._count = 0
        self._averages: dict[str, Tensor] = {}
        if self._every.unit == "step":  # only then is there a hook after each step, which costs a message
            self.on_step_end = self._after_step

    def on_start(self, fit: FitContext) -> None:
        """Begin anew, or where the checkpoint has ended; refuse what can't be averaged."""
        if fit.is_sharded:
            raise UserError("WeightAveraging needs the whole model on each rank: ddp, or deepspeed up to stage 2")
        if _batch_norms(fit.model) and fit.steps_per_epoch is None:
            message = "batch norm's statistics need an epoch of the training data, which has no length"
            raise UserError(f"WeightAveraging: {message}: give it a __len__, or use a norm without statistics")
        if fit.step == 0:  # also of another fit
            self._count, self._averages = 0, {}
        self._averages = {name: each.to(_parameters(fit.model)[name].device) for name, each in self._averages.items()}

    def on_epoch_end(self, fit: FitContext) -> None:
        """Add the weights, if that is the interval."""
        if self._every.unit == "epoch":
            self._look(fit, fit.epoch)

    def _after_step(self, fit: FitContext) -> None:
        self._look(fit, fit.epoch - 1)

    def _look(self, fit: FitContext, epochs: int) -> None:
        has_begun = self._start.number(fit.step, epochs) > 0
        if has_begun and self._every.is_over(fit.step, epochs):
            self._add(fit)

    @torch.no_grad()
    def _add(self, fit: FitContext) -> None:
        self._count += 1
        if fit.rank > 0:
            return
        with judged(fit.optimizer):
            for name, parameter in _parameters(fit.model).items():
                if name not in self._averages:
                    # In 16 bits the sum would soon stand still.
                    self._averages[name] = parameter.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
                average = self._averages[name]
                average += (parameter - average) / self._count

    def on_end(self, fit: FitContext) -> None:
        """Write the average. All ranks take part where there is batch norm."""
        if not self._count:
            if fit.rank == 0:
                say(f"warning: WeightAveraging averaged nothing: no {self._every} ended after {self._start}")
            return
        file = RunDir(fit.folder).swa_weights
        with self._in_place(fit.model):
            self._refresh_batch_norm(fit)
            if fit.rank == 0:
                try:
                    save_weights(bare_state_dict(fit.model), file)
                except OSError as error:
                    raise UserError(f"training is done, but {file} can't be written: {error.strerror}") from None

    @contextlib.contextmanager
    def _in_place(self, model: nn.Module) -> Iterator[None]:
        """Within the block rank 0's model has the average as its weights; afterwards all is as before."""
        before, buffers = {}, copies_of(model)
        with torch.no_grad():
            for name, parameter in _parameters(model).items():
                if name in self._averages:
                    before[name] = parameter.detach().clone()
                    parameter.copy_(self._averages[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weights in before.items():
                    model.get_parameter(name).copy_(weights)
            put_back(model, buffers)

    @torch.no_grad()
    def _refresh_batch_norm(self, fit: FitContext) -> None:
        """All ranks take part: they read the data together, and rank 0 calls the model."""
        layers = _batch_norms(fit.model)
        if not layers:
            return
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
        for micro_batch in fit.training_data():
            if fit.rank == 0 and micro_batch.samples:
                fit.run(micro_batch)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count, "averages": self._averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._count, self._averages = state["count"], dict(state["averages"])


def _interval(name: str, value: int | str) -> Interval:
    found = Interval.of(value)
    if found is None:
        expected = "a number of steps above 0, or text such as 10 epochs"
        raise UserError(f"WeightAveraging: {name}: expected {expected}, found {value!r}")
    return found


def _batch_norms(model: nn.Module) -> list[Any]:
    """The layers whose statistics training has moved."""
    layers = [layer for layer in model.modules() if isinstance(layer, BATCH_NORMS)]
    return [layer for layer in layers if layer.training and layer.running_mean is not None]


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that can be averaged."""
    return {n: each for n, each in model.named_parameters() if each.is_floating_point() or each.is_complex()}
