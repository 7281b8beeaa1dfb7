"""Commands that this one runs in its place: dtrain once more, or srun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from dtrain import signals

from ..rank.entry import die_with_parent
from .stop_requests import STOP_SIGNALS


def own_command() -> list[str]:
    """The command line of dtrain, for here or another machine: its script, or `python -m dtrain`."""
    script = os.path.abspath(sys.argv[0])
    return [sys.executable, "-m", "dtrain"] if os.path.basename(script) == "__main__.py" else [script]


class Subcommand:
    """Runs one command at a time in its own session: it gets each signal to this process once, and dies with it.

    Args:
        translated: signals that are passed on as another one.
    """

    def __init__(self, translated: Mapping[int, int]) -> None:
        self.asked: int | None = None
        self._translated = translated
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextmanager
    def passing_signals_on(cls, translated: Mapping[int, int] | None = None) -> Iterator[Subcommand]:
        command = cls(translated or {})
        with signals.handled(STOP_SIGNALS, command._pass_on):
            yield command

    def run(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        *,
        end_by: signal.Signals = signal.SIGKILL,
    ) -> int:
        """Run it to its end; the exit code.

        Args:
            end_by: what it gets when this process is killed.
        """
        self._process = subprocess.Popen(
            command,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(number=end_by),
        )
        if self.asked is not None:  # before there was one
            self._send(self.asked)
        code = self._process.wait()
        self._process = None
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._send(number)

    def _send(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(self._translated.get(number, number))
