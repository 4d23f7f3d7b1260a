"""Audio files to transcripts: decoded in threads, batched by length, answered in the order they were given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from resonance.data.audio import probe, read_audio
from resonance.data.convert import MEDIA_SUFFIX
from resonance.data.textfile import lines, read_text
from resonance.errors import AudioError, DataError
from resonance.messages import _
from resonance.transcribe.longform import windows
from resonance.transcribe.recognizer import DecodeSettings, Recognizer, TimedText, Transcript
from resonance.units import SAMPLE_RATE

# Files decoded together, so that clips of like length meet in a batch: at most so many batches' worth, and 230 MB.
POOL_BATCHES = 16
POOL_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class FileResult:
    """One audio file's transcript, or why there is none."""

    audio_path: str
    text: str
    language: str | None
    duration: float  # seconds
    segments: tuple[TimedText, ...]
    error: str | None
    coarse: bool = False  # the model gave no times: segments are as long as what it was given at once

    def as_row(self, timestamps: bool) -> dict[str, object]:
        """The row of the JSON output."""
        row: dict[str, object] = {"audio_path": self.audio_path}
        if self.error is not None:
            return row | {"error": self.error}
        row |= {"text": self.text, "language": self.language, "duration": round(self.duration, 3)}
        if timestamps:
            row["segments"] = [
                {"start": round(s.start, 2), "end": round(s.end, 2), "text": s.text} for s in self.segments
            ]
        return row


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


def list_audio(audio_path: Path | None, audio_list: Path | None) -> list[Path]:
    """The files to transcribe: one, all recordings below a folder, or those a list names.

    A list is a text file with a path a line, or a JSON list of paths or of rows with `audio_path`; its relative paths are
    taken from the list's folder, else from the current one. Raises DataError when there is nothing to do.
    """
    if audio_path is not None:
        if not audio_path.exists():
            raise DataError(_("{path}: no such file or folder. Check the name.").format(path=audio_path))
        if not audio_path.is_dir():
            return [audio_path]
        found = sorted(p for p in audio_path.rglob("*") if p.is_file() and MEDIA_SUFFIX.fullmatch(p.suffix))
        if not found:
            raise DataError(_("{path}: no audio files in this folder.").format(path=audio_path))
        return found
    assert audio_list is not None  # the configuration asks for one of the two
    names = _listed(audio_list)
    if not names:
        raise DataError(_("{path}: the list is empty.").format(path=audio_list))
    beside = [audio_list.parent / name for name in names]
    return [path if path.exists() else Path(name) for path, name in zip(beside, names, strict=True)]


def _listed(audio_list: Path) -> list[str]:
    text = read_text(audio_list)
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in lines(text) if line.strip()]
    try:
        rows = json.loads(text)
        names = [row if isinstance(row, str) else (row.get("audio_path") or row["audio"]) for row in rows]
    except json.JSONDecodeError as error:
        raise DataError(
            _("{path}: line {line}, column {column}: not valid JSON ({reason}). Correct it and run again.").format(
                path=audio_list, line=error.lineno, column=error.colno, reason=error.msg
            )
        ) from error
    except (AttributeError, KeyError, TypeError):
        names = [None]
    if isinstance(rows, dict) or not all(isinstance(name, str) for name in names):
        raise DataError(
            _(
                '{path}: not a list of recordings. Write one path a line, or JSON: ["a.wav", "b.wav"] or '
                '[{{"audio_path": "a.wav"}}].'
            ).format(path=audio_list)
        )
    return names


def transcribe_files(
    recognizer: Recognizer,
    spans: Sequence[Span],
    settings: DecodeSettings,
    *,
    batch_size: int,
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[FileResult]:
    """Results in the order of `spans`. A file that cannot be read gets a result with `error` and stops no other.

    `done` is called with the number of files finished since the last call.
    """
    with ThreadPoolExecutor(max_workers=2) as threads:
        for pool in _pools(spans, POOL_BATCHES * batch_size):
            audios = list(threads.map(_read, pool))
            yield from _transcribe_pool(recognizer, pool, audios, settings, batch_size)
            done(len(pool))


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
    coarse = any(transcript.text and not transcript.segments for _piece, transcript in parts)
    return FileResult(path, text, parts[0][1].language, duration, tuple(segments), None, coarse)


def _unspaced(character: str) -> bool:
    """Whether words stand without spaces where this character is: Chinese, Japanese and their punctuation."""
    return "\u3000" <= character <= "\u30ff" or "\u4e00" <= character <= "\u9fff" or "\uff00" <= character <= "\uff65"
