"""Recordings to transcripts: read in threads, cut into windows, decoded by length, answered in the order they were given."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from resonance.data.audio import iter_blocks, probe
from resonance.errors import AudioError, ModelError
from resonance.messages import _
from resonance.transcribe.assemble import UNHEARD, is_silent, put_together
from resonance.transcribe.longform import Samples, Window, windows
from resonance.transcribe.recognizer import DecodeSettings, Recognizer, Transcript
from resonance.transcribe.result import FileResult
from resonance.transcribe.sequential import decode_in_sequence
from resonance.units import WINDOW_SECONDS

# Windows decoded together, so that clips of like length meet in a batch: so many batches' worth, or 58 MB of audio.
POOL_BATCHES = 16
POOL_SECONDS = 900.0
READERS = 2
NO_AUDIO = np.zeros(0, np.float32)
READ_AHEAD = 32  # recordings that are being read, or have been and wait for their turn


@dataclass(frozen=True, slots=True)
class LongAudio:
    """How audio longer than the model hears at once is dealt with, and what is left out."""

    mode: Literal["auto", "windows", "sequential"] = "windows"
    max_window_seconds: float | None = None  # None: the recogniser's best
    skip_nonspeech: bool = False
    no_speech_threshold: float = 0.6
    condition_on_previous_text: bool = False


class Span(NamedTuple):
    """A file, or the part of it from `start` to `end` seconds."""

    path: Path
    start: float = 0.0
    end: float | None = None


@dataclass(slots=True)
class Recording:
    """What is known of one of the spans so far."""

    span: Span
    heard: list[tuple[Window, Transcript | None]] = field(default_factory=list)  # None: not decoded yet
    error: str | None = None
    read: bool = False  # to its end

    @property
    def finished(self) -> bool:
        return self.read and all(transcript is not None for _window, transcript in self.heard)

    def result(self, settings: DecodeSettings, long_audio: LongAudio) -> FileResult:
        heard = [(window, transcript) for window, transcript in self.heard if transcript is not None]
        return put_together(
            str(self.span.path),
            heard,
            settings,
            skip_nonspeech=long_audio.skip_nonspeech,
            no_speech_threshold=long_audio.no_speech_threshold,
            error=self.error,
        )


def transcribe_files(
    recognizer: Recognizer,
    spans: Iterable[Span],
    settings: DecodeSettings,
    *,
    batch_size: int,
    long_audio: LongAudio = LongAudio(),
    progress: Callable[[int, float], None] = lambda files, seconds: None,
) -> Iterator[FileResult]:
    """Results in the order of `spans`, each as soon as it and those before it are finished.

    A recording that cannot be read gets a result with `error` and stops no other; of one that is damaged further on, what
    can be read is transcribed. `progress` is called with the recordings finished and the seconds of audio dealt with since
    the last call. Memory is bounded, however long a recording is and however many there are.
    """
    found: list[bool] = []  # about the model: asked at the first long recording

    def possible() -> bool:
        """Whether any recording may be decoded in sequence: otherwise none has to be looked at."""
        return long_audio.mode == "sequential" or (
            long_audio.mode == "auto" and not recognizer.personal and found != [False]
        )

    def in_sequence(span: Span) -> bool:
        if not found:
            try:
                found.append(_decodes_in_sequence(recognizer, settings, long_audio, span))
            except AudioError:  # told when it is read; the next one will do
                return long_audio.mode == "sequential"
        return found[0]

    for needs_it, some in itertools.groupby(
        spans, lambda span: possible() and _longer(span, recognizer.max_clip_seconds, long_audio) and in_sequence(span)
    ):
        decode = _in_sequence if needs_it else _in_windows
        yield from decode(recognizer, some, settings, batch_size, long_audio, progress)


def _longer(span: Span, most: float, long_audio: LongAudio) -> bool:
    """Whether it may have to be decoded in sequence."""
    try:
        return (probe(span.path).duration if span.end is None else span.end) - span.start > most
    except AudioError:  # told when it is read, as far as it can be
        return long_audio.mode == "sequential"


def _in_windows(
    recognizer: Recognizer,
    spans: Iterable[Span],
    settings: DecodeSettings,
    batch_size: int,
    long_audio: LongAudio,
    progress: Callable[[int, float], None],
) -> Iterator[FileResult]:
    most = min(long_audio.max_window_seconds or recognizer.best_clip_seconds, recognizer.max_clip_seconds)
    waiting: deque[Recording] = deque()
    for pool in _pools(_windows(spans, most, waiting), POOL_BATCHES * batch_size):
        order = []
        for i, (recording, window, place) in enumerate(pool):
            if long_audio.skip_nonspeech and is_silent(window):
                recording.heard[place] = (replace(window, audio=NO_AUDIO), UNHEARD)
                progress(0, window.seconds)
            else:
                order.append(i)
        order.sort(key=lambda i: len(pool[i][1].audio))
        for begin in range(0, len(order), batch_size):
            batch = [pool[i] for i in order[begin : begin + batch_size]]
            answers = recognizer.transcribe([window.audio for _recording, window, _place in batch], settings)
            for (recording, window, place), answer in zip(batch, answers, strict=True):
                recording.heard[place] = (replace(window, audio=NO_AUDIO), answer)  # a long recording has many
            progress(0, sum(window.seconds for _recording, window, _place in batch))
        finished = 0
        while waiting and waiting[0].finished:
            yield waiting.popleft().result(settings, long_audio)
            finished += 1
        if finished:
            progress(finished, 0.0)
    finished = len(waiting)
    while waiting:
        yield waiting.popleft().result(settings, long_audio)
    if finished:
        progress(finished, 0.0)


Placed = tuple[Recording, Window, int]  # a window, and where its transcript belongs


def _windows(spans: Iterable[Span], most: float, waiting: deque[Recording]) -> Iterator[Placed | None]:
    """The windows of all spans, in their order, and None behind those of each. Each recording is put into `waiting` before its first window."""
    for span, parts in _read_ahead(spans, most):
        recording = Recording(span)
        waiting.append(recording)
        for part in parts:
            if isinstance(part, AudioError):
                recording.error = str(part)
                continue
            recording.heard.append((part, None))
            yield recording, part, len(recording.heard) - 1
        recording.read = True
        yield None


def _read_ahead(spans: Iterable[Span], most: float) -> Iterator[tuple[Span, Iterator[Window | AudioError]]]:
    """Each span with its windows. The first minutes of the next ones are read in threads, the rest when it is asked for."""
    with ThreadPoolExecutor(READERS) as threads:
        coming = iter(spans)
        ahead: deque[tuple[Span, Future[Iterator[Window | AudioError]]]] = deque()
        try:
            while True:
                for span in itertools.islice(coming, READ_AHEAD - len(ahead)):
                    ahead.append((span, threads.submit(_begin, span, most)))
                if not ahead:
                    return
                span, begun = ahead.popleft()
                yield span, begun.result()
        finally:
            for _span, begun in ahead:
                begun.cancel()


def _begin(span: Span, most: float) -> Iterator[Window | AudioError]:
    """The windows of a span, of which the first has been read."""
    parts = _windows_of(span, most)
    return itertools.chain(list(itertools.islice(parts, 1)), parts)


def _windows_of(span: Span, most: float) -> Iterator[Window | AudioError]:
    """The windows of a span, then what was wrong with it."""
    failed: list[AudioError] = []

    def blocks() -> Iterator[Samples]:
        try:
            yield from iter_blocks(span.path, span.start, span.end)
        except AudioError as error:
            failed.append(error)

    yield from windows(blocks(), most)
    yield from failed


def _pools(placed: Iterable[Placed | None], most: int) -> Iterator[list[Placed]]:
    """At most so many windows, or recordings, together: of those that cannot be read there may be thousands in a row."""
    pool: list[Placed] = []
    recordings, seconds = 0, 0.0
    for part in placed:
        if part is None:
            recordings += 1
        else:
            pool.append(part)
            seconds += part[1].seconds
        if len(pool) == most or seconds >= POOL_SECONDS or recordings > most:
            yield pool
            pool, recordings, seconds = [], 0, 0.0
    yield pool


def _decodes_in_sequence(recognizer: Recognizer, settings: DecodeSettings, long_audio: LongAudio, span: Span) -> bool:
    """Whether long recordings are decoded in sequence: asked for, or best for the model, which has to write times.

    A model tuned on short clips has not learnt to go on from a time of its own, nor to hear 30 s at once: of 40 sentences
    joined, one that was trained on single sentences got 4 % of the words wrong in windows of 5 s, 85 % in windows of 30 s.
    """
    first = next(windows(iter_blocks(span.path, span.start, span.start + recognizer.max_clip_seconds), WINDOW_SECONDS))
    (heard,) = recognizer.transcribe([first.audio], replace(settings, times="segment"))
    if long_audio.mode == "sequential" and not heard.timed:
        raise ModelError(
            _(
                "{name} does not write the times of what it hears, which --longform sequential needs. Give windows."
            ).format(name=recognizer.name)
        )
    return heard.timed


def _in_sequence(
    recognizer: Recognizer,
    spans: Iterable[Span],
    settings: DecodeSettings,
    batch_size: int,
    long_audio: LongAudio,
    progress: Callable[[int, float], None],
) -> Iterator[FileResult]:
    for span in spans:
        recording = Recording(span)
        try:
            for window, transcript in decode_in_sequence(
                recognizer,
                iter_blocks(span.path, span.start, span.end),
                settings,
                condition_on_previous_text=long_audio.condition_on_previous_text,
            ):
                recording.heard.append((replace(window, audio=NO_AUDIO), transcript))
                progress(0, window.seconds)
        except AudioError as error:
            recording.error = str(error)
        yield recording.result(settings, long_audio)
        progress(1, 0.0)
