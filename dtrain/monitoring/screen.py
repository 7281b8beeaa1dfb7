"""What the user sees of a run: a progress bar in a terminal, plain lines elsewhere; on stderr."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from dtrain.run.folder import Row
from dtrain.run.heartbeat import Beat
from dtrain.stderr import tolerated

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_LINE_EVERY_S = 30.0  # within a long epoch, where there is no terminal


class Screen:
    """Shows progress, rows and lines. Not thread-safe."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._is_terminal = sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._rate = Rate()
        self._last_line = time.monotonic()

    def print(self, line: str) -> None:
        """A line above the progress bar."""
        if self._quiet:
            return
        with tolerated(sys.stderr):
            if self._progress is not None:
                self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=sys.stderr, flush=True)

    def show_output(self, rank: int, lines: list[bytes], file: TextIO) -> None:
        """Lines that a rank printed, prefixed with its number; above the progress bar if the file is a terminal."""
        text = b"".join(b"[rank %d] %b\n" % (rank, line) for line in lines)
        if self._progress is not None and file.isatty():
            self.print(text.decode(errors="replace").removesuffix("\n"))
            return
        with tolerated(file):
            file.flush()
            file.buffer.write(text)  # unchanged, in whatever encoding
            file.buffer.flush()

    def show_row(self, row: Row) -> None:
        """An epoch that is done."""
        self._last_line = time.monotonic()
        self.print(row_line(row))

    def show_beat(self, beat: Beat) -> None:
        """The run's current position."""
        if self._quiet:
            return
        self._rate.add(beat)
        if self._is_terminal:
            self._draw(beat)
        elif time.monotonic() - self._last_line > PLAIN_LINE_EVERY_S:
            self._last_line = time.monotonic()
            phase = beat.evaluating or "step"
            total = f"/{beat.steps_in_epoch}" if beat.steps_in_epoch else ""
            place = f"{beat.in_fit}epoch {beat.epoch}/{beat.epochs}  {phase} {beat.step_in_epoch}{total}"
            rate = f"{self._rate.samples_per_s:,.0f} samples/s"
            self.print("  ".join(filter(None, (place, _loss(beat), rate))))

    def close(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _draw(self, beat: Beat) -> None:
        if self._progress is None:
            self._progress = _new_progress()
            self._task = self._progress.add_task("", total=None, loss="", rate="", left="")
            self._progress.start()
        assert self._task is not None
        self._progress.update(
            self._task,
            description=f"{beat.in_fit}epoch {beat.epoch}/{beat.epochs}{beat.evaluating and f' {beat.evaluating}'}",
            completed=beat.step_in_epoch,
            total=beat.steps_in_epoch or None,
            loss=_loss(beat),
            rate=f"{self._rate.samples_per_s:,.0f} samples/s",
            left=f"{duration(self._rate.seconds_left(beat))} left" if beat.steps_in_epoch else "",
        )


def _loss(beat: Beat) -> str:
    """Nothing before the first is seen, and in a loop of one's own, which keeps its losses to itself."""
    return "" if math.isnan(beat.loss) else f"loss {beat.loss:.4g}"


class Rate:
    """Speed over the last seconds, from beats."""

    WINDOW_S = 10.0

    def __init__(self) -> None:
        self._seen: list[tuple[float, Beat]] = []

    def add(self, beat: Beat) -> None:
        now = time.monotonic()
        if self._seen and beat.fit != self._seen[-1][1].fit:
            self._seen.clear()
        if not self._seen or beat.step != self._seen[-1][1].step:
            self._seen.append((now, beat))
        while len(self._seen) > 2 and now - self._seen[0][0] > self.WINDOW_S:
            self._seen.pop(0)

    def _per_second(self, count: str) -> float:
        if len(self._seen) < 2:
            return 0.0
        (begin, first), (end, last) = self._seen[0], self._seen[-1]
        return float(getattr(last, count) - getattr(first, count)) / (end - begin)

    @property
    def samples_per_s(self) -> float:
        return self._per_second("samples")

    def seconds_left(self, beat: Beat) -> float | None:
        """Seconds to the last epoch's end at this speed, without validation; None while unknown."""
        steps_per_s = self._per_second("step")
        if not steps_per_s or not beat.steps_in_epoch or beat.evaluating:
            return None
        return (beat.steps_in_epoch * (beat.epochs - beat.epoch + 1) - beat.step_in_epoch) / steps_per_s


def row_line(row: Row) -> str:
    """`epoch 3  step 36  train_loss 0.2112  val_loss 0.1905  val_acc 0.9413  31,870 samples/s`."""
    speed = row.get("samples_per_s")
    shown = {k: v for k, v in row.items() if k not in ("epoch", "step", "samples_per_s") and isinstance(v, float)}
    epoch = row["epoch"] if isinstance(row["epoch"], int) else f"{row['epoch']:.2f}"
    parts = [f"epoch {epoch}", f"step {row['step']}", values_line(shown)]
    return "  ".join([*filter(None, parts), f"{speed:,.0f} samples/s"] if isinstance(speed, float) and speed else parts)


def values_line(values: Mapping[str, Any]) -> str:
    """`test_loss 0.1905  test_acc 0.9413`: those that are single numbers."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items() if isinstance(value, float))


def duration(seconds: float | None) -> str:
    """`1:02:03`, `02:03`, or `--:--` if unknown."""
    if seconds is None:
        return "--:--"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"


def _new_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    fields = [TextColumn(f"{{task.fields[{name}]}}") for name in ("loss", "rate", "left")]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step"),
        MofNCompleteColumn(),
        *fields,
        console=Console(stderr=True),
        transient=True,
    )
