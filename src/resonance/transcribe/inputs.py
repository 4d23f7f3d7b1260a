"""Which recordings are transcribed: one, those of a folder or a pattern, or those a list names."""

from __future__ import annotations

import glob
import json
import os
import re
from pathlib import Path
from typing import Any

from resonance.data.convert import MEDIA_SUFFIX
from resonance.data.textfile import lines, read_text
from resonance.errors import DataError
from resonance.messages import _

WILDCARD = re.compile(r"[*?[]")


def list_audio(audio_path: Path | None, audio_list: Path | None) -> list[Path]:
    """The files to transcribe: one, all recordings below a folder, those a pattern fits, or those a list names.

    A list is a text file with a path a line, a JSON list or JSON lines of paths or of rows with `audio_path`; its relative
    paths are taken from the list's folder, else from the current one. What it names twice comes twice, and what does not
    exist comes too. Raises DataError when there is nothing to do.
    """
    if audio_path is not None:
        if os.path.isdir(audio_path):  # noqa: PTH112 - False, and no error, where the name is too long
            found = _below(audio_path)
            if not found:
                raise DataError(_("{path}: no audio files in this folder.").format(path=audio_path))
            return found
        if os.path.exists(audio_path):  # noqa: PTH110 - also where its name has the characters of a pattern
            return [audio_path]
        if not WILDCARD.search(str(audio_path)):
            raise DataError(_("{path}: no such file or folder. Check the name.").format(path=audio_path))
        found = _matching(audio_path)
        if not found:
            raise DataError(_("{path}: no recording fits this pattern.").format(path=audio_path))
        return found
    assert audio_list is not None  # the configuration asks for one of the two
    names = _listed(audio_list)
    if not names:
        raise DataError(_("{path}: the list is empty.").format(path=audio_list))
    folder = str(audio_list.parent)
    beside = [os.path.join(folder, name) for name in names]  # noqa: PTH118 - 100,000 names: half the time of Path's
    return [Path(path if os.path.exists(path) else name) for path, name in zip(beside, names, strict=True)]  # noqa: PTH110


def _below(folder: Path) -> list[Path]:
    return sorted(
        Path(place) / name
        for place, _folders, names in os.walk(folder)
        for name in names
        if MEDIA_SUFFIX.fullmatch(os.path.splitext(name)[1])  # noqa: PTH122
    )


def _matching(pattern: Path) -> list[Path]:
    """Where the pattern ends in a suffix of its own, that decides; else recordings are told by theirs."""
    found = (Path(name) for name in glob.iglob(str(pattern), recursive=True))  # noqa: PTH207 - Path's takes no absolute one
    chosen = pattern.suffix and not WILDCARD.search(pattern.suffix)
    return sorted(path for path in found if (chosen or MEDIA_SUFFIX.fullmatch(path.suffix)) and path.is_file())


def _listed(audio_list: Path) -> list[str]:
    text = read_text(audio_list)
    first = text.lstrip()[:1]
    if first not in ("[", "{") or _is_one_path(text):
        return [line.strip() for line in lines(text) if line.strip()]
    try:
        rows = json.loads(text) if first == "[" else [json.loads(line) for line in lines(text) if line.strip()]
    except json.JSONDecodeError as error:
        raise DataError(
            _("{path}: line {line}, column {column}: not valid JSON ({reason}). Correct it and run again.").format(
                path=audio_list, line=error.lineno, column=error.colno, reason=error.msg
            )
        ) from error
    names = [_name(row) for row in rows]
    if None in names:
        raise DataError(
            _(
                '{path}: not a list of recordings: entry {row} names none. Write one path a line, or JSON: ["a.wav", "b.wav"] '
                'or [{{"audio_path": "a.wav"}}].'
            ).format(path=audio_list, row=names.index(None) + 1)
        )
    return [name for name in names if name is not None]


def _is_one_path(text: str) -> bool:
    """Whether a list begins with the name of a file that begins with a bracket: `[old] tape.wav`."""
    head = next(lines(text.lstrip())).strip()
    return bool(MEDIA_SUFFIX.fullmatch(Path(head).suffix))


def _name(row: Any) -> str | None:
    found = (row.get("audio_path") or row.get("audio")) if isinstance(row, dict) else row
    return found if isinstance(found, str) and found.strip() else None
