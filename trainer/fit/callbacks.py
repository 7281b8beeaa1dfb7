"""The user's own code at a fit's moments: which hooks there are, what they see, and what they may ask for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dtrain.errors import Problem, UserError, among, first_line
from dtrain.run.folder import Row, RunDir
from dtrain.run.heartbeat import Phase
from dtrain.stderr import say

from ..checkpoint.codec import require_data
from ..checks.optimizer_kinds import judged
from ..data.first_batch import first_micro_batch
from ..data.indexed import MicroBatch
from ..distributed.wishes import Agreement, Wish
from ..loss.step import Outcome
from .data import FitData
from .progress import Progress
from .trained import Trained

HOOKS = ("on_start", "on_step_end", "on_validation_end", "on_epoch_end", "on_save", "on_stop", "on_end")
_AFTER_A_ROW = ("on_validation_end", "on_epoch_end")


class CallbackError(Exception):
    """A callback has failed; the message says which one, and when."""


class FitContext:
    """What a callback sees of the fit that it is called in, on each rank, and may ask for.

    What one rank or more ask for, all do: a checkpoint or the end at once where `on_validation_end` or `on_epoch_end`
    ask, everything else after the next step.

    Attributes:
        folder: the run's folder.
        row: the last one, as in metrics.jsonl; empty before the first.
    """

    def __init__(self, run: RunDir, trained: Trained, data: FitData, progress: Progress, agreement: Agreement) -> None:
        self.folder: Path = run.path
        self._trained = trained
        self._data = data
        self._progress = progress
        self._agreement = agreement

    @property
    def epoch(self) -> int:
        """The one that is being trained, from 1; in `on_epoch_end` the one that has ended."""
        return self._progress.position.epoch

    @property
    def step(self) -> int:
        """Optimizer steps since the run began."""
        return self._progress.position.step

    @property
    def rank(self) -> int:
        return self._trained.world.rank

    @property
    def world_size(self) -> int:
        return self._trained.world.world_size

    @property
    def model(self) -> nn.Module:
        """The bare model. Under fsdp and deepspeed this rank has a part of its parameters."""
        return self._trained.model.bare

    @property
    def is_sharded(self) -> bool:
        """Whether a forward pass of the model is a collective, since each rank has a part of it (fsdp, deepspeed)."""
        return self._trained.model.forwards_together

    @property
    def optimizer(self) -> Optimizer:
        return self._trained.optimizer

    @property
    def row(self) -> Row:
        return dict(self._progress.rows[-1]) if self._progress.rows else {}

    @property
    def steps_per_epoch(self) -> int | None:
        """None where nobody knows, as for a stream."""
        return self._data.train.num_steps

    def training_data(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches of an epoch of the training data, for `on_end`, where no training follows.

        All ranks take part, and go through all of it. A stream may have no end.
        """
        train = self._data.train
        for number, batch in enumerate(train.epoch(self.epoch), 1):
            yield from batch.micro_batches
            self._progress.beat(Phase.VALIDATING, number, train.num_steps)

    def validation_samples(self, most: int) -> MicroBatch | None:
        """The first samples of the (first) set to validate on; None where there is none, or no order.

        This rank reads them, on its device. No collective.
        """
        val = self._data.val
        return first_micro_batch(val[0].given, most, self._trained.world.device) if val else None

    def run(self, micro_batch: MicroBatch) -> Outcome:
        """What the loss or the step finds for it, with the model as it is. All ranks take part where it is sharded."""
        model, step = self._trained.model, self._trained.step
        return model.run(step, micro_batch) if model.forwards_together else step(model.bare, micro_batch)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Around `run`: as in a validation, and without a trace."""
        model = self._trained.model
        with torch.no_grad(), judged(self.optimizer), model.preserving_state(), model.evaluating():
            yield

    def validate(self) -> None:
        """Ask for a validation, after the next step."""
        self._agreement.wish(Wish.VALIDATE)

    def save(self) -> None:
        """Ask for a checkpoint."""
        self._agreement.wish(Wish.SAVE)

    def end(self) -> None:
        """Ask for the end: the run is finished after a last report and validation."""
        self._agreement.wish(Wish.END)


class Callbacks:
    """A fit's callbacks, in their order; those without a hook are not called for it.

    Args:
        given: objects with any of HOOKS, each called with a `FitContext`.

    Raises:
        UserError: one is no callback.
    """

    def __init__(self, given: Sequence[Any]) -> None:
        self._given = [(f"callbacks.{i}", _required(each, f"callbacks.{i}")) for i, each in enumerate(given)]
        self._hooks = {hook: [each for each in self._given if hasattr(each[1], hook)] for hook in HOOKS}

    def has(self, *hooks: str) -> bool:
        """Whether any callback has one of these."""
        return any(self._hooks[hook] for hook in hooks)

    @property
    def act_after_rows(self) -> bool:
        """Whether there may be something to agree on after a row."""
        return self.has(*_AFTER_A_ROW)

    def call(self, hook: str, fit: FitContext) -> None:
        """Call the hook of all that have it. All ranks do; a collective in it needs all of them.

        Raises:
            UserError: one refuses what it is used for.
            CallbackError: one has failed.
        """
        for path, callback in self._hooks[hook]:
            try:
                getattr(callback, hook)(fit)
            except UserError as error:  # refused in words
                raise UserError([Problem(str(each), path) for each in error.problems]) from error
            except Exception as error:
                cause = f"{type(error).__name__}: {first_line(error)}"
                message = f"{path}: {type(callback).__name__}.{hook} failed after step {fit.step}: {cause}"
                # With its traceback, which ends at the callback's own line.
                raise CallbackError(message).with_traceback(error.__traceback__) from None

    def require_savable(self) -> None:
        """Raise UserError if a checkpoint can't hold the state of one."""
        for path, callback in self._given:
            if hasattr(callback, "state_dict"):
                require_data(path, callback, callback.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """By place and class, the state of those that have one. Each rank has its own."""
        return {_key(*each): each[1].state_dict() for each in self._given if hasattr(each[1], "state_dict")}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Have them continue; those that had no state then begin anew, and are named."""
        for path, callback in self._given:
            if hasattr(callback, "load_state_dict"):
                if (key := _key(path, callback)) in states:
                    callback.load_state_dict(states[key])
                else:
                    say(f"warning: {path}: the checkpoint has no state of a {type(callback).__name__}: it begins anew")


def _key(path: str, callback: Any) -> str:
    return f"{path} {type(callback).__name__}"


def _required(given: Any, path: str) -> Any:
    if isinstance(given, type):
        raise UserError(Problem(f"{given.__name__} is a class: give it an object, such as {given.__name__}()", path))
    name = type(given).__name__
    methods = [method for method in dir(given) if method.startswith("on_")]
    if unknown := [method for method in methods if method not in HOOKS]:
        raise UserError(Problem(f"{name} has {unknown[0]}, which nothing calls; {among(unknown[0], HOOKS)}", path))
    if not methods:
        raise UserError(Problem(f"{name} is no callback: it has none of {', '.join(HOOKS)}", path))
    return given
