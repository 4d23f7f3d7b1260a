"""Utterances to a manifest in the keys that users write themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from resonance.data.manifest import Utterance
from resonance.data.textfile import write_text_atomic


def write_manifest(path: Path, utterances: Iterable[Utterance]) -> None:
    """Write JSON lines if `path` ends in `.jsonl`, else a JSON list, in the keys that users write themselves.

    Audio paths inside the manifest's folder are written relative to it. An existing file is replaced at once or, on a
    DataError (no permission, disk full), not at all.
    """
    folder = os.path.normpath(path.parent.absolute()) + os.sep
    rows = (json.dumps(_as_row(utterance, folder), ensure_ascii=False) for utterance in utterances)
    if path.suffix == ".jsonl":
        write_text_atomic(path, (f"{row}\n" for row in rows))
    else:
        write_text_atomic(path, _json_list(rows))


def _json_list(rows: Iterable[str]) -> Iterator[str]:
    before = "[\n"
    for row in rows:
        yield before + row
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def _as_row(utterance: Utterance, folder: str) -> dict[str, object]:
    audio = os.path.normpath(Path(utterance.audio).absolute())
    inside = audio.startswith(folder)
    row: dict[str, object] = {
        "audio": audio[len(folder) :].replace(os.sep, "/") if inside else audio,
        "text": utterance.text,
    }
    if utterance.start:
        row["start"] = utterance.start
    for key in ("end", "duration", "language", "speaker"):
        if (value := getattr(utterance, key)) is not None:
            row[key] = value
    if utterance.segments:
        row["sentences"] = [{"start": s.start, "end": s.end, "text": s.text} for s in utterance.segments]
    return row
