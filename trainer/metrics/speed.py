"""How fast a run trains."""

from __future__ import annotations

import time


class Speed:
    """Samples per second, of the time between `start` and `pause`."""

    def __init__(self) -> None:
        self._samples, self._seconds = 0, 0.0
        self._began: float | None = None

    def start(self) -> None:
        self._began = time.perf_counter()

    def add(self, samples: int) -> None:
        self._samples += samples

    def pause(self) -> None:
        if self._began is not None:
            self._seconds += time.perf_counter() - self._began
        self._began = None

    def take(self) -> float | None:
        """Those since the last call; None where there were none."""
        samples, seconds = self._samples, self._seconds
        self._samples, self._seconds = 0, 0.0
        return samples / seconds if samples else None
