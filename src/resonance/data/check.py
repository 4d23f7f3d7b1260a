"""Every row of a manifest, looked at and listened to before it is trained on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from resonance.data.audio import probe, read_audio
from resonance.data.decoders import PACKET_SECONDS
from resonance.data.manifest import Utterance
from resonance.data.rows import MAX_LISTED, excerpt
from resonance.data.split import sentence_key
from resonance.errors import AudioError, DataError
from resonance.messages import _
from resonance.units import MAX_LABEL_TOKENS, SAMPLE_RATE, WINDOW_SECONDS

MIN_CLIP_SECONDS = 0.1  # shorter than any word: the shortest of 400 spoken digits lasts 0.17 s
# The loudest sample, so that one soft word in a long pause counts as speech. The softest of 1,950 clips of healthy and
# dysarthric speakers peaks at -31 dBFS; a muted microphone and a converter's noise floor stay below -60.
SILENT_PEAK_DBFS = -60.0
# Loud but whole speech, scaled to full scale, has at most 0.03 % of its samples there; 3.5 dB too loud gives 0.8 %.
FULL_SCALE = 0.99
CLIPPED_SHARE = 0.005
# A byte-level tokenizer makes at most one token of a byte; a label has 5 special tokens, and 8 leave room for more.
SPECIAL_TOKENS = 8

Severity = Literal["lost", "warning"]
Kind = Literal[
    "missing",
    "unreadable",
    "too_long",
    "too_short",
    "silent",
    "label_too_long",
    "audio_in_validation",
    "clipped",
    "past_end",
    "empty_text",
    "duplicate_row",
    "duplicate_audio",
    "sentence_in_validation",
]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_CHUNK = 512  # rows handed to the threads at a time: a queue of 100,000 would hold 100 MB


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong with one row. `lost`: the row cannot be trained on; `warning`: it can, but look at it."""

    row: int
    audio: str
    kind: Kind
    severity: Severity
    message: str


@dataclass(frozen=True)
class CheckReport:
    """What was found. `utterances` are the rows to train on, with the measured `duration`."""

    checked: list[Utterance]
    utterances: list[Utterance]
    problems: list[Problem]

    @property
    def loses_rows(self) -> bool:
        return len(self.utterances) < len(self.checked)


@dataclass(frozen=True, slots=True)
class _Measured:
    seconds: float | None
    digest: bytes | None  # of the decoded samples; None where there are none to compare
    problems: tuple[Problem, ...]


def check(
    utterances: Sequence[Utterance],
    *,
    max_audio_len: float = WINDOW_SECONDS,
    min_audio_len: float = MIN_CLIP_SECONDS,
    count_tokens: Callable[[str], int] | None = None,
    other: Sequence[Utterance] | None = None,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> CheckReport:
    """Decode every row and judge it and its text.

    `max_audio_len`, `min_audio_len`: seconds. `count_tokens`: tokens of a text's label, special tokens included; without
    it a label is judged by its bytes. `other`: the validation rows, to find recordings and sentences on both sides.
    `workers`: threads (default: one for each processor). `progress` is called with 1 for each row decoded.
    One row's audio is held in memory by each thread.
    """
    measure = partial(_measure, max_seconds=max_audio_len, min_seconds=min_audio_len)
    measured = list(_in_threads(measure, utterances, workers, progress))
    problems = [problem for result in measured for problem in result.problems]
    problems += [problem for utterance in utterances if (problem := _judge_label(utterance, count_tokens))]
    problems += _duplicates(utterances, measured)
    if other:
        problems += _in_both(utterances, measured, other, list(_in_threads(measure, other, workers, progress)))
    lost = {(problem.row, problem.audio) for problem in problems if problem.severity == "lost"}
    usable = [
        dataclasses.replace(utterance, duration=result.seconds)
        for utterance, result in zip(utterances, measured, strict=True)
        if (utterance.row, utterance.audio) not in lost
    ]
    return CheckReport(list(utterances), usable, sorted(problems, key=lambda problem: problem.row))


def probe_durations(utterances: Sequence[Utterance], workers: int | None = None) -> list[Utterance]:
    """The rows with `duration` filled from the files' headers; each file is opened once and not decoded.

    Raises one DataError that lists the rows whose file is missing or unreadable, or shorter than the
    row's times say.
    """
    paths = list(dict.fromkeys(utterance.audio for utterance in utterances))
    lengths = dict(zip(paths, _in_threads(_file_length, paths, workers, None), strict=True))
    faults = []
    timed = []
    for utterance in utterances:
        length = lengths[utterance.audio]
        if isinstance(length, str):
            faults.append(_("row {row}: {fault}").format(row=utterance.row, fault=length))
            continue
        if (outside := _span_fault(utterance, length)) is not None:
            faults.append(_("row {row}: {fault}").format(row=utterance.row, fault=outside))
            continue
        seconds = min(utterance.end or length, length) - utterance.start
        timed.append(dataclasses.replace(utterance, duration=seconds))
    if faults:
        shown = [f"  {fault}" for fault in faults[:MAX_LISTED]]
        if len(faults) > MAX_LISTED:
            shown.append("  " + _("… and {count} more").format(count=len(faults) - MAX_LISTED))
        head = _(
            "{count} of {total} recordings cannot be used. Correct these rows, or let `resonance data check --fix` leave "
            "them out:"
        ).format(count=len(faults), total=len(utterances))
        raise DataError("\n".join([head, *shown]))
    return timed


def _file_length(path: str) -> float | str:
    """Seconds, or what is wrong with the file."""
    if not Path(path).is_file():
        return _missing(path)
    try:
        return probe(path).duration
    except AudioError as error:
        return str(error)


def _measure(utterance: Utterance, max_seconds: float, min_seconds: float) -> _Measured:
    problems: list[Problem] = []

    def found(kind: Kind, severity: Severity, message: str) -> None:
        problems.append(Problem(utterance.row, utterance.audio, kind, severity, message))

    length = _file_length(utterance.audio)
    if isinstance(length, str):
        found("unreadable" if Path(utterance.audio).is_file() else "missing", "lost", length)
        return _Measured(None, None, tuple(problems))
    if (outside := _span_fault(utterance, length)) is not None:
        found("past_end", "lost", outside)
        return _Measured(None, None, tuple(problems))
    seconds = min(utterance.end or length, length) - utterance.start
    if seconds > max_seconds:  # not decoded: it may last hours
        found("too_long", "lost", _too_long(seconds, max_seconds))
        return _Measured(seconds, None, tuple(problems))
    try:
        samples = read_audio(utterance.audio, utterance.start, utterance.end, max_seconds=max_seconds + PACKET_SECONDS)
    except AudioError as error:
        found("unreadable", "lost", str(error))
        return _Measured(None, None, tuple(problems))
    seconds = len(samples) / SAMPLE_RATE
    if seconds < min_seconds:
        found(
            "too_short",
            "lost",
            _("{seconds:.2f} s long, less than {limit} s").format(seconds=seconds, limit=min_seconds),
        )
        return _Measured(seconds, None, tuple(problems))
    level = np.abs(samples)
    peak = float(level.max())
    if peak < 10 ** (SILENT_PEAK_DBFS / 20):
        # Silence without a text teaches the model to write nothing, which is wanted.
        if utterance.text:
            heard = _("nothing at all") if peak == 0 else f"{20 * np.log10(peak):.0f} dBFS"
            found("silent", "lost", _("silent: the loudest moment is {heard}").format(heard=heard))
        return _Measured(seconds, None, tuple(problems))
    share = float(np.mean(level >= FULL_SCALE))
    if share > CLIPPED_SHARE:
        found(
            "clipped",
            "warning",
            _("{share:.1%} of it is cut off at full scale: lower the recording level").format(share=share),
        )
    return _Measured(seconds, hashlib.blake2b(samples.tobytes(), digest_size=16).digest(), tuple(problems))


def _judge_label(utterance: Utterance, count_tokens: Callable[[str], int] | None) -> Problem | None:
    def found(kind: Kind, severity: Severity, message: str) -> Problem:
        return Problem(utterance.row, utterance.audio, kind, severity, message)

    if not utterance.text:
        return found("empty_text", "warning", _("no text: right for noise and silence, wrong for speech"))
    size = len(utterance.text.encode("utf-8", "surrogatepass"))
    if size + SPECIAL_TOKENS <= MAX_LABEL_TOKENS:
        return None
    if count_tokens is None:
        return found(
            "label_too_long",
            "warning",
            _("the text may be too long: {size} bytes can be more than {limit} tokens").format(
                size=size, limit=MAX_LABEL_TOKENS
            ),
        )
    tokens = count_tokens(utterance.text)
    if tokens <= MAX_LABEL_TOKENS:
        return None
    return found(
        "label_too_long",
        "lost",
        _("the text is too long: {tokens} tokens, and the model writes {limit} at most").format(
            tokens=tokens, limit=MAX_LABEL_TOKENS
        ),
    )


def _duplicates(utterances: Sequence[Utterance], measured: Sequence[_Measured]) -> Iterator[Problem]:
    spans: dict[tuple[str, float, float | None], Utterance] = {}
    contents: dict[bytes, Utterance] = {}
    for utterance, result in zip(utterances, measured, strict=True):
        first = spans.setdefault((utterance.audio, utterance.start, utterance.end), utterance)
        kind: Kind = "duplicate_row"
        if first is utterance and result.digest is not None:
            first = contents.setdefault(result.digest, utterance)
            kind = "duplicate_audio"
        if first is utterance:
            continue
        if sentence_key(first.text) == sentence_key(utterance.text):
            message = _("the same recording as in row {row} ({name})")
        else:
            message = _("the same recording as in row {row} ({name}) with another text: “{first}”, here “{second}”")
        yield Problem(
            utterance.row,
            utterance.audio,
            kind,
            "warning",
            message.format(
                row=first.row,
                name=Path(first.audio).name,
                first=excerpt(first.text, 30),
                second=excerpt(utterance.text, 30),
            ),
        )


def _in_both(
    utterances: Sequence[Utterance],
    measured: Sequence[_Measured],
    other: Sequence[Utterance],
    other_measured: Sequence[_Measured],
) -> Iterator[Problem]:
    spans = {(row.audio, row.start, row.end): row for row in other}
    contents = {result.digest: row for row, result in zip(other, other_measured, strict=True) if result.digest}
    sentences = {key: row for row in other if (key := sentence_key(row.text))}
    for utterance, result in zip(utterances, measured, strict=True):
        twin = spans.get((utterance.audio, utterance.start, utterance.end)) or contents.get(result.digest or b"")
        if twin is not None:
            message = _("also in the validation list, row {row}: scores on it would not be honest").format(row=twin.row)
            yield Problem(utterance.row, utterance.audio, "audio_in_validation", "lost", message)
        elif (same := sentences.get(sentence_key(utterance.text))) is not None:
            message = _("“{text}” is in the validation list too, row {row}").format(
                text=excerpt(utterance.text, 40), row=same.row
            )
            yield Problem(utterance.row, utterance.audio, "sentence_in_validation", "warning", message)


def _in_threads(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    workers: int | None,
    progress: Callable[[int], object] | None,
) -> Iterator[_Result]:
    """The results in order. Threads and not processes: decoding and resampling release Python's lock."""
    pool = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="check")
    try:
        for start in range(0, len(items), _CHUNK):
            for result in pool.map(function, items[start : start + _CHUNK]):
                if progress is not None:
                    progress(1)
                yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _missing(path: str) -> str:
    if Path(path).is_dir():
        return _("{path}: this is a folder, not an audio file").format(path=path)
    folder = Path(path).parent
    if not folder.is_dir():
        return _("{path}: no such file; there is no folder {folder}").format(path=path, folder=folder)
    return _("{path}: no such file").format(path=path)


def _too_long(seconds: float, limit: float) -> str:
    return _("{seconds:.1f} s long, more than {limit:g} s: cut it into shorter recordings").format(
        seconds=seconds, limit=limit
    )


def _span_fault(utterance: Utterance, length: float) -> str | None:
    """What is wrong with the row's times in a file of `length` seconds; the same limits as `read_audio`."""
    if utterance.start < length and (utterance.end or 0.0) <= length + PACKET_SECONDS:
        return None
    return _("{path}: from {start:.2f} s to {end}, but the file is only {length:.2f} s long").format(
        path=utterance.audio,
        start=utterance.start,
        end=_("its end") if utterance.end is None else f"{utterance.end:.2f} s",
        length=length,
    )
