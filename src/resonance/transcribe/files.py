"""Audio files to transcripts: decoded in threads, batched by length, answered in the order they were given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resonance.data.audio import probe, read_audio
from resonance.errors import AudioError
from resonance.transcribe.longform import windows
from resonance.transcribe.recognizer import DecodeSettings, Recognizer, TimedText, Transcript
from resonance.transcribe.result import FileResult
from resonance.units import SAMPLE_RATE

# Files decoded together, so that clips of like length meet in a batch: at most so many batches' worth, and 230 MB.
POOL_BATCHES = 16
POOL_SECONDS = 3600.0


class Span(NamedTuple):
    """A file, or the part of it from `start` to `end` seconds."""

    path: Path
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One window of one file, ready to be decoded."""

    file: int
    start: float  # seconds into the file
    audio: np.ndarray


def transcribe_files(
    recognizer: Recognizer,
    spans: Sequence[Span],
    settings: DecodeSettings,
    *,
    batch_size: int,
    progress: Callable[[int, float], None] = lambda files, seconds: None,
) -> Iterator[FileResult]:
    """Results in the order of `spans`. A file that cannot be read gets a result with `error` and stops no other.

    `progress` is called with the files finished and the seconds of audio decoded since the last call.
    """
    with ThreadPoolExecutor(max_workers=2) as threads:
        for pool in _pools(spans, POOL_BATCHES * batch_size):
            audios = list(threads.map(_read, pool))
            results = list(_transcribe_pool(recognizer, pool, audios, settings, batch_size))
            progress(len(pool), sum(result.duration for result in results))
            yield from results


def _pools(spans: Sequence[Span], most: int) -> Iterator[list[Span]]:
    """`spans` in their order, in parts of at most `most` files and, but for a single longer file, POOL_SECONDS."""
    pool: list[Span] = []
    seconds = 0.0
    for span in spans:
        length = _seconds(span)
        if pool and (len(pool) == most or seconds + length > POOL_SECONDS):
            yield pool
            pool, seconds = [], 0.0
        pool.append(span)
        seconds += length
    if pool:
        yield pool


def _seconds(span: Span) -> float:
    try:
        return (span.end or probe(span.path).duration) - span.start
    except AudioError:  # becomes the file's result
        return 0.0


def _read(span: Span) -> np.ndarray | str:
    try:
        return read_audio(span.path, span.start, span.end)
    except AudioError as error:
        return str(error)


def _transcribe_pool(
    recognizer: Recognizer,
    spans: Sequence[Span],
    audios: Sequence[np.ndarray | str],
    settings: DecodeSettings,
    batch_size: int,
) -> Iterator[FileResult]:
    pieces = [
        Piece(file, a / SAMPLE_RATE, audio[a:b])
        for file, audio in enumerate(audios)
        if not isinstance(audio, str)
        for a, b in windows(audio, recognizer.max_clip_seconds)
    ]
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i].audio))
    transcripts: dict[int, Transcript] = {}
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        results = recognizer.transcribe([pieces[i].audio for i in batch], settings)
        transcripts.update(zip(batch, results, strict=True))
    for file, (span, audio) in enumerate(zip(spans, audios, strict=True)):
        if isinstance(audio, str):
            yield FileResult(str(span.path), "", None, 0.0, (), audio)
            continue
        parts = [(pieces[i], transcripts[i]) for i in range(len(pieces)) if pieces[i].file == file]
        yield _joined(str(span.path), len(audio) / SAMPLE_RATE, parts)


def _joined(path: str, duration: float, parts: Sequence[tuple[Piece, Transcript]]) -> FileResult:
    segments = []
    for piece, transcript in parts:
        inside = transcript.segments or (TimedText(0.0, len(piece.audio) / SAMPLE_RATE, transcript.text),)
        segments += [TimedText(piece.start + s.start, piece.start + s.end, s.text) for s in inside if s.text]
    texts = [transcript.text for _piece, transcript in parts if transcript.text]
    text = texts[0] if texts else ""
    for following in texts[1:]:
        text += following if _unspaced(text[-1]) and _unspaced(following[0]) else f" {following}"
    return FileResult(path, text, parts[0][1].language, duration, tuple(segments), None)


def _unspaced(character: str) -> bool:
    """Whether words stand without spaces where this character is: Chinese, Japanese and their punctuation."""
    return "\u3000" <= character <= "\u30ff" or "\u4e00" <= character <= "\u9fff" or "\uff00" <= character <= "\uff65"
