"""One record for a recording and its transcript, whatever file it came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Segment:
    """A timed part of an utterance. Times are seconds from the utterance's start."""

    start: float
    end: float
    text: str


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording, or a span of one, and what is said in it."""

    audio: str  # path of the audio file, resolved
    text: str
    row: int  # where the manifest says so: 1-based row, or line for line-based formats
    start: float = 0.0  # seconds into the file
    end: float | None = None  # seconds into the file; None is the file's end
    duration: float | None = None  # seconds of the span, where known
    language: str | None = None
    speaker: str | None = None
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """All utterances of one manifest file or folder."""

    path: Path
    format: str  # name of the reader that understood it, e.g. "JSON list"
    utterances: list[Utterance]
