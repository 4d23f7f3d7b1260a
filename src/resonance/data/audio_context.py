"""How much audio the encoder looks at. Free of torch: the planner asks too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resonance.units import POSITIONS_PER_SECOND, WINDOW_POSITIONS, WINDOW_SECONDS

# Context lengths in seconds, each about 8 % longer than the one before: rounding up then adds 4 % on average, while
# shapes stay few enough for kernels and allocators that cache by shape.
CONTEXT_SECONDS = tuple(sorted({min(round(1.08**k, 1), WINDOW_SECONDS) for k in range(46)}))


@dataclass(frozen=True, slots=True)
class AudioContext:
    """How much audio the encoder sees at once.

    `length` is "auto" (the longest clip of the batch and `margin_seconds`, rounded up), "full" (the model's own window,
    30 s) or a number of seconds. `window_positions` is the model's `max_source_positions`.
    """

    length: Literal["auto", "full"] | float
    margin_seconds: float
    window_positions: int = WINDOW_POSITIONS

    def positions(self, clip_seconds: float) -> int:
        """Encoder positions (50 a second) for a batch whose longest clip has this many seconds."""
        if self.length == "full":
            return self.window_positions
        if self.length == "auto":
            wanted = round(clip_seconds + self.margin_seconds, 6)  # 1.1 + 0.6 is 1.7000000000000002
            seconds = next((s for s in CONTEXT_SECONDS if s >= wanted), CONTEXT_SECONDS[-1])
        else:
            seconds = self.length
        return min(max(round(seconds * POSITIONS_PER_SECOND), 1), self.window_positions)
