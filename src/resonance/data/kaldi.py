"""Kaldi data folders: `wav.scp`, `text`, and where they are there `segments` and `utt2spk`."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from resonance.data.manifest import Utterance
from resonance.data.rows import Resolver, clean_text, excerpt, raise_problems
from resonance.data.textfile import lines, read_text
from resonance.errors import ManifestError
from resonance.messages import _

_ARCHIVE_OFFSET = re.compile(r"\.ark:\d+$")


def is_kaldi_folder(folder: Path) -> bool:
    return (folder / "wav.scp").is_file()


def read_kaldi(folder: Path, resolve: Resolver) -> list[Utterance]:
    """One utterance for each line of `text`, numbered by that line. Recordings without a line there are left out.

    Raises ManifestError for a missing `text`, for commands in `wav.scp`, and for ids that do not fit together.
    """
    if not (folder / "text").is_file():
        raise ManifestError(
            _("{folder}: wav.scp is there but no file “text” with what is said. Add it.").format(folder=folder)
        )
    problems: list[str] = []
    recordings = _recordings(folder / "wav.scp", resolve, problems)
    spans = _spans(folder / "segments", problems)
    raise_problems(folder, problems)  # before ids are looked up: each fault would be told twice
    speakers = {key: sys.intern(value) for _line, key, value in _entries(folder / "utt2spk")}
    utterances = []
    for line, key, text in _entries(folder / "text"):
        recording, start, end = spans.get(key, (None, 0.0, None)) if spans is not None else (key, 0.0, None)
        if recording is None:
            problems.append(_at("text", line, _("{id} is not in segments").format(id=key)))
        elif recording not in recordings:
            problems.append(_at("text", line, _("{id} is not in wav.scp").format(id=recording)))
        else:
            duration = None if end is None else end - start
            speaker = speakers.get(key)
            utterances.append(
                Utterance(recordings[recording], clean_text(text), line, start, end, duration, speaker=speaker)
            )
    raise_problems(folder, problems)
    return utterances


def _recordings(path: Path, resolve: Resolver, problems: list[str]) -> dict[str, str]:
    recordings = {}
    for line, key, value in _entries(path):
        if value.endswith("|"):
            fault = _("{value} is a command, which is not run. Convert to audio files and name those").format(
                value=excerpt(value)
            )
        elif _ARCHIVE_OFFSET.search(value):
            fault = _("{value} is a Kaldi archive. Convert to audio files and name those").format(value=excerpt(value))
        elif not value:
            fault = _("{id} has no audio file").format(id=key)
        else:
            recordings[key] = resolve(value)
            continue
        problems.append(_at("wav.scp", line, fault))
    return recordings


def _spans(path: Path, problems: list[str]) -> dict[str, tuple[str | None, float, float | None]] | None:
    """Utterance id to (recording id, start, end), in seconds; None without a file `segments`. End -1 is the file's end."""
    if not path.is_file():
        return None
    spans: dict[str, tuple[str | None, float, float | None]] = {}
    for line, key, value in _entries(path):
        try:
            recording, start, end = value.split()
            span = recording, float(start), (None if float(end) == -1 else float(end))
        except ValueError:
            span = None
        if span is None or span[1] < 0 or (span[2] is not None and not span[2] > span[1]):
            problems.append(
                _at(
                    "segments",
                    line,
                    _("expected “utterance recording start end”, found {value}").format(
                        value=excerpt(f"{key} {value}")
                    ),
                )
            )
        else:
            spans[key] = span
    return spans


def _entries(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, id and the rest of each line that is not blank; nothing when there is no such file."""
    if not path.is_file():
        return
    for number, line in enumerate(lines(read_text(path)), 1):
        if fields := line.split(maxsplit=1):
            yield number, fields[0], fields[1].strip() if len(fields) > 1 else ""


def _at(file: str, line: int, fault: str) -> str:
    return _("{file}, line {line}: {fault}").format(file=file, line=line, fault=fault)
