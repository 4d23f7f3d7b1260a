"""How much audio a model is given at once: what it was trained on, in every engine."""

from __future__ import annotations

from typing import Literal

from resonance.data.audio_context import AudioContext
from resonance.errors import ConfigError
from resonance.messages import _
from resonance.model.adapters import Info
from resonance.units import TIMESTAMP_STEP_SECONDS

# A model tuned on phrases is given at least so much of a long recording: speech without a pause has to fit.
LEAST_WINDOW_SECONDS = 5.0


def choose_context(
    info: Info | None, given: Literal["auto", "full"] | float | None, window_positions: int
) -> AudioContext:
    """The audio context that a model was trained with, unless another is given; of a stock model its whole window.

    Raises ConfigError where nothing would be left for the speech.
    """
    if info is None:
        return AudioContext(given or "full", 0.0, window_positions)
    context = given or info.audio_context
    if isinstance(context, float) and context <= info.audio_margin:
        raise ConfigError(
            [
                _(
                    "--audio_context {context:g}: the model was trained with {margin:g} seconds of silence behind the speech, "
                    "so nothing would be left for the speech. Give more, or leave --audio_context out."
                ).format(context=context, margin=info.audio_margin)
            ]
        )
    return AudioContext(context, info.audio_margin, window_positions)


def max_clip_seconds(context: AudioContext) -> float:
    """The longest clip that fits into the audio context with its margin."""
    most = context.window_positions
    if isinstance(context.length, float):
        most = min(most, context.positions(0.0))
    seconds = most * TIMESTAMP_STEP_SECONDS
    return seconds if context.length == "full" else seconds - context.margin_seconds


def best_clip_seconds(info: Info | None, context: AudioContext) -> float:
    """As long as the longest clip the model was trained on, where that is known."""
    trained = info.data.get("longest_clip_seconds") if info else None
    if trained is None:
        return max_clip_seconds(context)
    return min(max(float(trained), LEAST_WINDOW_SECONDS), max_clip_seconds(context))
