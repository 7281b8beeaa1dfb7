"""Which of a run's metrics each phase (train, val, ema, or val_NAME) reports, and which values may be monitored."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from dtrain.errors import Problem, UserError, among
from dtrain.schema.metrics.monitor import monitor_problem
from dtrain.schema.metrics.sets import default_monitor, monitor_missing, value_of

from .early_stopping import Best
from .epoch_totals import Tally

if TYPE_CHECKING:
    from .given_metrics import AnyMetric, Given


class PhaseMetrics:
    """The metrics by name, and how they are used.

    Args:
        activations: by metric, what turns predictions into probabilities.
        in_training: names of those that training reports too; None: all that do not keep samples.

    Raises:
        UserError: what is no metric, or a name that none has.
    """

    def __init__(
        self,
        given: Given | None,
        device: torch.device,
        activations: Mapping[str, str | None] | None = None,
        in_training: Collection[str] | None = None,
    ) -> None:
        self._device = device
        self._activations = dict(activations or {})
        self._in_training = in_training
        self.by_name: dict[str, AnyMetric] = {}
        if given is not None and len(given):
            from .given_metrics import as_metrics  # torchmetrics takes a second or two to import

            self.by_name = as_metrics(given)
            if "loss" in self.by_name:
                raise UserError("a metric is named loss: train_loss and val_loss are the losses; give it another name")
        _require_names("activations", self._activations, self.by_name)
        _require_names("train_metrics", in_training or (), self.by_name)

    def tally(self, phase: str, *, training: bool = False) -> Tally:
        """A tally for the phase, whose name begins its values' names, with its own copies of the metrics.

        Args:
            training: whether it is that of the training's steps, which may have fewer metrics.
        """
        if not self.by_name:
            return Tally(phase, self._device)
        from .given_metrics import keeps_samples
        from .metric_set import MetricSet

        chosen, names = self._in_training, list(self.by_name)
        if training:
            names = [n for n in names if (n in chosen if chosen is not None else not keeps_samples(self.by_name[n]))]
        metrics = {name: copy.deepcopy(self.by_name[name]) for name in names}
        activations = {name: self._activations.get(name) for name in names}
        own = MetricSet(metrics, activations, self._device) if metrics else None
        return Tally(phase, self._device, own, self.by_name)

    def better(self, reported: str, tallies: Collection[Tally]) -> str | None:
        """Whether lower or higher is better for a reported value, if torchmetrics says so: min or max."""
        metric = self.by_name.get(value_of(reported, [tally.phase for tally in tallies]))
        higher = getattr(metric, "higher_is_better", None)
        return None if higher is None else "max" if higher else "min"

    def require_mode(self, best: Best, tallies: Collection[Tally]) -> None:
        """Raise UserError if the mode would select the worst epoch as the best."""
        if (better := self.better(best.monitor, tallies)) not in (None, best.mode):
            message = f"is {best.mode}, but {'higher' if better == 'max' else 'lower'} is better for {best.monitor}"
            raise UserError(Problem(message, "mode", hint=f"mode: {better} (fit.early_stopping.mode)"))


def monitor_of(given: str | None, phases: Sequence[str]) -> str:
    """What decides which weights are best, of training and these phases of the validation.

    Raises:
        UserError: it has to be said.
    """
    if given is None and (missing := monitor_missing(phases)):
        raise UserError(Problem(missing, "monitor"))
    return given or default_monitor(phases)


def require_monitor(monitor: str, tallies: Collection[Tally], *, may_log: bool) -> None:
    """Raise UserError if no single number will be reported under that name.

    Args:
        may_log: whether a step of the user's own may report other values.
    """
    known = {name: values for tally in tallies for name, values in tally.known(monitor).items()}
    if problem := monitor_problem(monitor, known, may_log=may_log):
        raise UserError(f"monitor: {problem}")


def _require_names(kind: str, asked: Collection[str], metrics: Collection[str]) -> None:
    for name in asked:
        if name not in metrics:
            hint = among(name, list(metrics)) if metrics else "there are no metrics"
            raise UserError(Problem(f"names the metric {name}, which does not exist", kind, hint=hint))
