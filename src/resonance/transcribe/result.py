"""What became of one recording."""

from __future__ import annotations

from dataclasses import dataclass

from resonance.transcribe.recognizer import TimedText


@dataclass(frozen=True, slots=True)
class FileResult:
    """One recording's transcript, or why there is none. Of a recording that is damaged in the middle or cut off, both: what
    could be read is transcribed, and `error` says where it ended."""

    audio_path: str
    text: str
    language: str | None
    duration: float  # seconds that were read
    segments: tuple[TimedText, ...]  # at least one where there is text, also where no times were asked for
    error: str | None
    left_out: tuple[TimedText, ...] = ()  # what the model wrote for silence, noise or music: not part of `text`
    phrase: str | None = None  # of the phrase list, where one was given and this is one of it
    phrase_score: float | None = None  # 0-1
