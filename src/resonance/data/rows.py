"""One row of any manifest, given as a mapping of names to values, to one Utterance."""

# ruff: noqa: PTH100, PTH110, PTH118, PTH208
# Why os.path: it is five times as fast as pathlib, and a manifest has 100,000 paths
from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from resonance.data.manifest import Segment, Utterance
from resonance.errors import ManifestError
from resonance.messages import _

# Names seen in users' files, the more specific first: Common Voice (path, sentence, client_id, locale), audiofolder
# (file_name, transcription), NeMo (audio_filepath, offset), Whisper-Finetune (nested audio.path, sentence, sentences).
AUDIO_KEYS = ("audio_path", "audio", "audio_filepath", "path", "file", "file_name", "filename")
TEXT_KEYS = ("text", "sentence", "transcription", "transcript")
START_KEYS = ("start", "start_time", "offset")
END_KEYS = ("end", "end_time")
SPEAKER_KEYS = ("speaker", "speaker_id", "client_id")
LANGUAGE_KEYS = ("language", "locale", "lang")
SEGMENT_KEYS = ("sentences", "segments")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # JSON can spell them, UTF-8 files cannot hold them
_TIME_KEYS = frozenset((*START_KEYS, *END_KEYS, "duration"))

MAX_LISTED = 20  # problems printed in one message; a wrong column name makes every row wrong

Resolver = Callable[[str], str]
Say = Callable[[str], None]
Where = Callable[[int], str]  # a row's number to the words for it


def in_row(number: int) -> str:
    return _("row {number}").format(number=number)


def in_line(number: int) -> str:
    return _("line {number}").format(number=number)


def path_resolver(folders: Sequence[Path]) -> Resolver:
    """A function from a path in a manifest to an absolute path: in the first of `folders` that has it, else the first.

    Looks at the disk only when there is a choice. A `\\` written on Windows works elsewhere too. An address such as
    `s3://bucket/001.wav` stays as it is.
    """
    roots = [os.path.abspath(folder) for folder in folders]

    # Both caches are for speed: 100,000 paths share a few folders, and asking the disk for each took 1.9 s.
    @functools.cache
    def places(folder: str) -> tuple[str, ...]:
        found = (os.path.normpath(os.path.join(root, folder)) for root in roots)
        return tuple(dict.fromkeys(path if path.endswith(os.sep) else path + os.sep for path in found))

    @functools.cache
    def files(folder: str) -> frozenset[str]:
        try:
            return frozenset(os.listdir(folder))
        except OSError:
            return frozenset()

    def resolve(name: str) -> str:
        if "://" in name:
            return name
        if "\\" in name and not (os.sep == "/" and os.path.exists(os.path.join(roots[0], name))):
            name = name.replace("\\", "/")
        folder, slash, file = name.rpartition("/")
        candidates = places(folder or slash)
        if len(candidates) > 1:
            for place in candidates:
                if file in files(place):
                    return place + file
        return candidates[0] + file

    return resolve


def row_reader(resolve: Resolver, problems: list[str], where: Where) -> Callable[[object, int], Utterance | None]:
    """A function from a row and its number to an utterance.

    A row that makes no sense gives None, and a line in `problems` for all that is wrong with it. Texts, speakers and
    languages that occur again share one string.
    """
    texts: dict[str, str] = {}

    def read(row: object, number: int) -> Utterance | None:
        faults: list[str] = []
        if not isinstance(row, dict):
            expected = '{"audio": "audio/001.wav", "text": "…"}'
            problems.append(
                _("{where}: expected {expected}, found {value}").format(
                    where=where(number), expected=expected, value=excerpt(row)
                )
            )
            return None
        utterance = _read(row, number, faults.append)
        if faults:
            problems.append(f"{where(number)}: {'; '.join(faults)}")
            return None
        return utterance

    def _read(row: Mapping[str, object], number: int, fault: Say) -> Utterance:
        audio = first_of(row, AUDIO_KEYS)
        times = row
        if isinstance(audio, dict):
            times = {**row, **audio}
            audio = first_of(audio, AUDIO_KEYS)
        name = _audio_name(audio, row, fault)
        text = _text(first_of(row, TEXT_KEYS), row, fault)
        start, end, duration = (0.0, None, None) if _TIME_KEYS.isdisjoint(times) else _span(times, fault)
        return Utterance(
            resolve(name),
            texts.setdefault(text, text),
            number,
            start,
            end,
            duration,
            _label(row, LANGUAGE_KEYS),
            _label(row, SPEAKER_KEYS),
            _segments(first_of(row, SEGMENT_KEYS), fault),
        )

    return read


def first_of(row: Mapping[str, object], keys: Sequence[str]) -> object:
    """The value of the first of `keys` that `row` has and that is not null; None where there is none."""
    for key in keys:
        if (value := row.get(key)) is not None:
            return value
    return None


def clean_text(text: str) -> str:
    """A transcript as it is trained on: as written, in Unicode NFC, without white space around it."""
    text = text.strip()
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def raise_problems(path: Path, problems: Sequence[str]) -> None:
    """Raise one ManifestError that names every problem (the first 20, then their number). Nothing when there is none."""
    if not problems:
        return
    shown = [f"  {problem}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        shown.append("  " + _("… and {count} more").format(count=len(problems) - MAX_LISTED))
    head = _("{path}: rows that cannot be used: {count}. Correct them and run the command again:").format(
        path=path, count=len(problems)
    )
    raise ManifestError("\n".join([head, *shown]))


def _audio_name(audio: object, row: Mapping[str, object], fault: Say) -> str:
    if audio is None:
        fault(
            _("no audio file: expected one of {expected}, found {found}").format(
                expected=", ".join(AUDIO_KEYS), found=_filled(row)
            )
        )
    elif not isinstance(audio, str):
        fault(_("the audio file must be a path in quotes, found {value}").format(value=excerpt(audio)))
    elif not (name := audio.strip()):
        fault(_("the audio file's name is empty"))
    elif "\x00" in name:
        fault(_("the audio file's name {value} has a NUL character in it").format(value=excerpt(name)))
    else:
        return name
    return ""


def _filled(row: Mapping[str, object]) -> str:
    return ", ".join(key for key, value in row.items() if value is not None) or _("nothing")


def _text(text: object, row: Mapping[str, object], fault: Say) -> str:
    if isinstance(text, str):
        if not text.isascii() and _HALF_CHARACTER.search(text):
            fault(_("the text has half a character in it, such as \\ud83d alone: type it again"))
        return clean_text(text)
    if text is None:
        fault(
            _("no text: expected one of {expected}, found {found}").format(
                expected=", ".join(TEXT_KEYS), found=_filled(row)
            )
        )
    else:
        fault(_("the text must be in quotes, found {value}").format(value=excerpt(text)))
    return ""


def _span(row: Mapping[str, object], fault: Say) -> tuple[float, float | None, float | None]:
    """Start, end and duration in seconds, as far as the row states them."""
    start = _seconds(row, START_KEYS, fault)
    end = _seconds(row, END_KEYS, fault)
    duration = _seconds(row, ("duration",), fault)
    if start is not None and end is None and duration:
        end = start + duration  # NeMo's offset and duration
    if end is not None:
        duration = end - (start or 0.0)
        if duration <= 0:
            fault(_("it ends at {end} s, which is not after its start").format(end=end))
    return start or 0.0, end, duration or None  # some tools write 0 for a duration they did not measure


def _seconds(row: Mapping[str, object], keys: Sequence[str], fault: Say) -> float | None:
    """A time in seconds, written as a number or, in tables, as text; None where it is absent or empty."""
    value = first_of(row, keys)
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = math.nan
    if math.isfinite(seconds) and seconds >= 0:
        return seconds
    key = next(key for key in keys if row.get(key) is not None)
    fault(_("{key} must be a number of seconds, 0 or more, found {value}").format(key=key, value=excerpt(value)))
    return None


def _label(row: Mapping[str, object], keys: Sequence[str]) -> str | None:
    value = first_of(row, keys)
    text = "" if value is None else str(value).strip()
    return sys.intern(text) if text else None


def _segments(value: object, fault: Say) -> tuple[Segment, ...]:
    if not isinstance(value, list):  # Common Voice has a text column “segment”, unrelated
        return ()
    segments = []
    for part in value:
        problems: list[str] = []
        row = part if isinstance(part, Mapping) else {}
        start, end = _seconds(row, START_KEYS, problems.append), _seconds(row, END_KEYS, problems.append)
        text = first_of(row, TEXT_KEYS)
        if problems or start is None or end is None or end < start or not isinstance(text, str):
            expected = '{"start": 0.0, "end": 1.5, "text": "…"}'
            fault(
                _("a sentence with times must look like {expected}, found {value}").format(
                    expected=expected, value=excerpt(part)
                )
            )
        else:
            segments.append(Segment(start, end, clean_text(text)))
    return tuple(segments)


def excerpt(value: object, width: int = 60) -> str:
    """`value` as a user would recognise it in the file, cut to `width` characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("\n", "⏎").replace("\r", "")
    return text if len(text) <= width else text[: width - 1] + "…"
