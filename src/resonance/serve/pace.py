"""How fast the model is, as measured: for how much a batch may hold, and for when to ask again."""

from __future__ import annotations

import threading

KEPT = 0.8  # of what was measured before, at each batch: the last five or so count
BEFORE_MEASURED = 1.0  # seconds of audio a second: what a small machine reaches


class Pace:
    """Written by the inference thread, read by all."""

    def __init__(self) -> None:
        self._each: dict[int, float] = {}  # seconds for one window, by positions
        self._audio = self._busy = 0.0  # seconds of audio, and of computing
        self._lock = threading.Lock()

    def took(self, seconds: float, positions: int, windows: int, audio_seconds: float) -> None:
        """A batch has been decoded."""
        with self._lock:
            each = seconds / windows
            self._each[positions] = KEPT * self._each.get(positions, each) + (1 - KEPT) * each
            self._audio = KEPT * self._audio + audio_seconds
            self._busy = KEPT * self._busy + seconds

    def window_seconds(self, positions: int) -> float | None:
        """What one more window of so many positions takes. None: nothing has been measured."""
        with self._lock:
            if positions in self._each or not self._each:
                return self._each.get(positions)
            nearest = min(self._each, key=lambda known: abs(known - positions))
            return self._each[nearest] * positions / nearest

    @property
    def throughput(self) -> float:
        """Seconds of audio that are decoded in a second."""
        with self._lock:
            return max(self._audio / self._busy, 1e-3) if self._busy else BEFORE_MEASURED
