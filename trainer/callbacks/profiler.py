"""A torch.profiler trace of some steps, for Perfetto or Chrome, and on CUDA what was allocated when."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dtrain.errors import UserError
from dtrain.files import refusal, write_atomic
from dtrain.run.folder import RunDir
from dtrain.run.profiling import Profiling
from dtrain.stderr import say

from ..distributed.torch_private import dump_memory, record_memory, stop_recording_memory
from ..fit.callbacks import FitContext


class Profiler:
    """Traces steps `first` to `last` into RUN/profile/, as `dtrain launch --profile` does. It changes no number.

    On CUDA the ranks also record from the beginning what they allocate, and write it down, for pytorch.org/memory_viz,
    after these steps, and if memory runs out.

    Args:
        first, last: counted from the run's beginning, like the steps of rows.
        ranks: those that do so.
    """

    def __init__(self, first: int, last: int, ranks: Sequence[int] = (0,)) -> None:
        self._asked = Profiling.of(f"steps={first}-{last},ranks={','.join(map(str, ranks))}")
        self._profile: profile | None = None
        self._step = contextlib.ExitStack()  # what is open in the trace
        self._began = 0
        self._records_memory = False

    @classmethod
    def of(cls, text: str) -> Profiler:
        """The one that `--profile` asks for with this text."""
        asked = Profiling.of(text)
        return cls(asked.first, asked.last, asked.ranks)

    def on_start(self, fit: FitContext) -> None:
        """Begin, where the next step is one of them."""
        self._asked.require_ranks(fit.world_size)
        folder = RunDir(fit.folder).profile
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"can't write {folder}: {refusal(error)}") from None
        if fit.step >= self._asked.last and fit.rank == 0:
            say(f"warning: {self._steps} are done already, and are not profiled")
        if fit.rank in self._asked.ranks and fit.step < self._asked.last:
            if any(parameter.is_cuda for parameter in fit.model.parameters()):
                self._records_memory = True
                record_memory(self._file(fit, "out-of-memory", "pickle"))
            self._look(fit)

    def on_step_end(self, fit: FitContext) -> None:
        """End a step's mark in the trace, and begin the next one's."""
        if fit.rank in self._asked.ranks:
            self._step.close()
            self._look(fit)

    def on_stop(self, fit: FitContext) -> None:
        """Write what there is so far."""
        self._write(fit)

    def on_end(self, fit: FitContext) -> None:
        """The same, if the run has ended before the last of the steps; rank 0 says so if none has come."""
        self._write(fit)
        if fit.rank == 0 and fit.step < self._asked.first:
            say(f"warning: {self._steps} never came, and nothing was profiled: the run has {fit.step} steps")

    @property
    def _steps(self) -> str:
        first, last = self._asked.first, self._asked.last
        return f"steps {first} to {last}"

    def _look(self, fit: FitContext) -> None:
        if fit.step >= self._asked.last:
            self._write(fit)
        elif fit.step + 1 >= self._asked.first:
            if self._profile is None:
                self._began = fit.step + 1
                cuda = [ProfilerActivity.CUDA] * torch.cuda.is_available()
                self._profile = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True)
                self._profile.start()
            self._step.enter_context(record_function(f"step {fit.step + 1}"))

    def _write(self, fit: FitContext) -> None:
        self._step.close()
        if self._profile is None:
            return
        done, self._profile = self._profile, None
        done.stop()
        if fit.step < self._began:
            return
        file = self._file(fit, f"steps-{self._began}-{fit.step}", "json")
        try:
            write_atomic(file, lambda temporary: done.export_chrome_trace(str(temporary)), durable=False)
            if self._records_memory:
                dump_memory(file.with_suffix(".pickle"))
                stop_recording_memory()
        except (OSError, RuntimeError) as error:
            cause = refusal(error) if isinstance(error, OSError) else error
            say(f"warning: can't write {file}: {cause}; training goes on")
        else:
            say(f"profile of steps {self._began} to {fit.step} on rank {fit.rank}: {file}; open it in ui.perfetto.dev")

    @staticmethod
    def _file(fit: FitContext, what: str, form: str) -> Path:
        return RunDir(fit.folder).profile / f"rank-{fit.rank}-{what}.{form}"
