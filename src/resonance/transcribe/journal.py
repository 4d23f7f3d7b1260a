"""Rows of finished recordings, appended one by one: a process that is killed loses none of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from resonance.errors import DataError
from resonance.messages import _
from resonance.transcribe.rows import Row, as_json

OPEN_FILES = 200  # a thousand processes have a thousand journals, and systems let a process open as many


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a row lies, and what is in it."""

    path: Path
    offset: int  # bytes
    failed: bool  # has an error; a recording that is damaged or cut off may have a text too
    text: bool
    name: str | None  # of its text in an output folder


class Journal:
    """A file of JSON lines that is written to the end of. A last line that a kill has torn is cut off first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._added = 0
        self._stream: FileIO | None = None

    def append(self, row: Row) -> None:
        """Raises DataError when it cannot be written; nothing of the row is left in the file then."""
        line = f"{as_json(row)}\n".encode()
        try:
            if self._stream is None:
                self._stream = self._opened()
            end = self._stream.tell()
            try:
                while line:
                    line = line[self._stream.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._stream.truncate(end)
                raise
        except OSError as error:
            raise DataError(
                _(
                    "{path}: cannot be written ({reason}). What was finished before is kept ({count} recordings in this run). "
                    "Free some space and run the same command again: it goes on from there."
                ).format(path=self.path, reason=error.strerror or error, count=self._added)
            ) from error
        self._added += 1

    def _opened(self) -> FileIO:
        whole = 0
        if self.path.exists():
            for _name, _entry, end in _entries(self.path):
                whole = end
        # Not opened for appending: the position is where the last whole row ends.
        stream = FileIO(self.path, "r+" if self.path.exists() else "x+")
        stream.truncate(whole)
        stream.seek(whole)
        return stream

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def read_entries(paths: Iterable[Path]) -> dict[str, list[Entry]]:
    """All rows of the journals that exist, by recording, in the order in which they were written."""
    found: dict[str, list[Entry]] = {}
    for path in paths:
        if path.is_file():
            for name, entry, _end in _entries(path):
                found.setdefault(name, []).append(entry)
    return found


def best(entries: Iterable[Entry]) -> Entry | None:
    """The first row without an error, else the last one."""
    chosen = None
    for entry in entries:
        if not entry.failed:
            return entry
        chosen = entry
    return chosen


def read_rows(entries: Iterable[Entry]) -> Iterator[Row]:
    """The rows at these places, one at a time."""
    with contextlib.ExitStack() as stack:
        streams: dict[Path, BinaryIO] = {}
        for entry in entries:
            if entry.path not in streams:
                if len(streams) == OPEN_FILES:
                    stack.close()
                    streams.clear()
                streams[entry.path] = stack.enter_context(entry.path.open("rb"))
            streams[entry.path].seek(entry.offset)
            yield json.loads(streams[entry.path].readline())


def _entries(path: Path) -> Iterator[tuple[str, Entry, int]]:
    """(recording, place, end in bytes) of each whole row; others are passed over."""
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            end = offset + len(line)
            row = _parsed(line)
            if row is not None:
                name = row.get("name")
                text = "text" in row or name is not None
                yield row["audio_path"], Entry(path, offset, "error" in row, text, name), end
            offset = end


def _parsed(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("audio_path"), str) else None
