"""The batch that a loop of the user's own has in hand: whether it is trained on, and how fast that goes."""

from __future__ import annotations

from ..metrics.speed import Speed


class Turn:
    """Of the outermost loader, one batch after the other.

    Attributes:
        is_counted: whether its loss was scaled: it is trained on.
        samples: trained on since this process began, over all ranks.
        is_pending: whether a gradient waits for an optimizer's step, which a checkpoint would not have.
    """

    def __init__(self) -> None:
        self.is_counted = self.is_pending = False
        self.samples = 0
        self._speed = Speed()

    def count(self, samples: int) -> None:
        """It is trained on."""
        self.is_counted = self.is_pending = True
        self.samples += samples
        self._speed.add(samples)

    def end(self) -> bool:
        """It is done with; whether it was trained on."""
        self.pause()
        was_counted, self.is_counted = self.is_counted, False
        return was_counted

    def begin(self) -> None:
        """The next one is to come."""
        self._speed.start()

    def pause(self) -> None:
        """What follows is no training: a report, or a validation amid it."""
        if self.is_counted:
            self._speed.pause()

    def resume(self) -> None:
        """That is over."""
        if self.is_counted:
            self._speed.start()

    def take_speed(self) -> float | None:
        """Samples per second of training since the last call; None where there was none."""
        return self._speed.take()
