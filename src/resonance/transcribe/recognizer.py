"""What every engine does: a batch of audio in, a transcript for each clip out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How to decode. None leaves the choice to the model or its adapter."""

    language: str | None = None  # Whisper's code; None: the adapter's, else detected
    task: Literal["transcribe", "translate"] | None = None
    num_beams: int = 1
    timestamps: bool = False


@dataclass(frozen=True, slots=True)
class TimedText:
    """A piece of a transcript. Times are seconds from the start of the audio."""

    start: float
    end: float
    text: str


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was understood of one clip."""

    text: str
    language: str | None
    segments: tuple[TimedText, ...] = ()


class Recognizer(Protocol):
    """A loaded model."""

    @property
    def name(self) -> str:
        """What was loaded: a hub name or a folder."""

    @property
    def max_clip_seconds(self) -> float:
        """The longest clip that can be decoded at once; longer audio is cut first (`longform`)."""

    def transcribe(self, clips: Sequence[np.ndarray], settings: DecodeSettings) -> list[Transcript]:
        """Transcripts of clips float32 [samples] at 16 kHz, in their order. They are decoded as one batch."""
