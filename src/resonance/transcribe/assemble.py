"""The transcripts of a recording's windows put together, at their true times, without what was made up for silence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from resonance.transcribe.longform import Window
from resonance.transcribe.recognizer import DecodeSettings, TimedText, Transcript
from resonance.transcribe.result import FileResult
from resonance.transcribe.segments import follows_speech, joined, spread
from resonance.transcribe.speech import NOBODY, nobody_spoke

UNHEARD = Transcript("", None)  # of a window in which nobody speaks: whatever a model wrote would be left out


def is_silent(window: Window) -> bool:
    """Whether the detector is so sure that nobody speaks that no model has to be asked."""
    return window.speech is not None and window.speech < NOBODY


def put_together(
    audio_path: str,
    heard: Iterable[tuple[Window, Transcript]],
    settings: DecodeSettings,
    *,
    skip_nonspeech: bool,
    no_speech_threshold: float = 0.6,
    error: str | None = None,
) -> FileResult:
    """One recording. `heard`: its windows in their order, with UNHEARD for those that no model was asked about."""
    segments: list[TimedText] = []
    left_out: list[TimedText] = []
    languages: dict[str, float] = {}  # seconds of what was kept
    text, duration, count = "", 0.0, 0
    only: Transcript | None = None  # what was heard, where that is in one window
    for window, transcript in heard:
        count += 1
        duration = window.start + window.seconds
        only = transcript
        if transcript is UNHEARD:
            left_out.append(TimedText(window.start, window.start + window.seconds, ""))
        if not transcript.text:
            continue
        pieces = transcript.segments
        if settings.times != "none" and not transcript.timed and not follows_speech(pieces, window.spoken.seconds):
            pieces = spread(pieces, window.spoken.start, window.spoken.end)
        shifted = [_shifted(segment, window.start) for segment in pieces]
        if skip_nonspeech and nobody_spoke(
            window.speech,
            transcript,
            no_speech_threshold=no_speech_threshold,
            log_prob_threshold=settings.log_prob_threshold,
            loop_ratio=settings.compression_ratio_threshold,
        ):
            left_out += shifted
            only = None
            continue
        segments += shifted
        text = joined(text, transcript.text)
        if transcript.language:
            languages[transcript.language] = languages.get(transcript.language, 0.0) + window.seconds
    alone = only if count == 1 else None
    return FileResult(
        audio_path,
        text,
        max(languages, key=lambda code: languages[code]) if languages else settings.language,
        duration,
        tuple(segments),
        error,
        tuple(left_out),
        alone.phrase if alone else None,
        alone.phrase_score if alone else None,
    )


def _shifted(segment: TimedText, seconds: float) -> TimedText:
    words = tuple(replace(word, start=word.start + seconds, end=word.end + seconds) for word in segment.words)
    return replace(segment, start=segment.start + seconds, end=segment.end + seconds, words=words)
