"""Where finished texts go: the screen, one file for all, or a file for each recording."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from resonance.config_types import OutputFormat
from resonance.data.textfile import lines, read_text, write_text_atomic
from resonance.errors import DataError
from resonance.messages import _
from resonance.ranks import Ranks
from resonance.transcribe.destinations import key, names, shared_files
from resonance.transcribe.formats import render
from resonance.transcribe.journal import Entry, best, read_entries, read_rows
from resonance.transcribe.kept import Kept
from resonance.transcribe.rows import Row, encodable, printable
from resonance.transcribe.subtitles import Layout


class Sink(Protocol):
    """Takes rows as they are finished."""

    def left(self) -> list[Path]:
        """What this process has to transcribe."""

    def add(self, row: Row) -> None:
        """Write one row. Raises DataError when that is not possible; the rows before it stay."""

    def finish(self) -> int:
        """Bring all together. Returns how many recordings failed, in all processes where this is the last one."""

    def close(self) -> None:
        """Let go of the output, also after an error."""


class Screen:
    """stdout. Without a format: one text alone; several with their file before a tab; with times, one segment a line."""

    def __init__(self, recordings: Sequence[Path], form: OutputFormat | None, layout: Layout) -> None:
        self._recordings = recordings
        self._several = len(recordings) > 1
        self._form = form
        self._layout = layout
        self._shown = 0
        self._failed = 0

    def left(self) -> list[Path]:
        return list(self._recordings)

    def add(self, row: Row) -> None:
        self._failed += "error" in row
        for text in self._plain(row) if self._form is None else self._rendered(row, self._form):
            sys.stdout.write(encodable(text, sys.stdout, is_json=self._form in ("json", "jsonl")))
        sys.stdout.flush()
        self._shown += 1

    def _rendered(self, row: Row, form: OutputFormat) -> Iterator[str]:
        """A part of one document: JSON's brackets and the titles of a table come once."""
        parts = list(render(form, [row], several=self._several or form == "json", layout=self._layout))
        if form == "json":
            yield ",\n" if self._shown else "[\n"
            yield parts[0].removeprefix("[\n")  # parts[1] closes the list
        else:
            yield from parts[1:] if form == "tsv" and self._shown else parts

    def _plain(self, row: Row) -> Iterator[str]:
        if "text" not in row:
            return
        prefix = f"{printable(row['audio_path'])}\t" if self._several else ""
        segments = row.get("segments")
        if segments is None:
            yield f"{prefix}{row['text']}\n"
        else:
            yield from (f"{prefix}[{s['start']:.2f} - {s['end']:.2f}] {s['text']}\n" for s in segments)

    def finish(self) -> int:
        if self._form == "json":
            print("\n]")
        return self._failed

    def close(self) -> None:
        pass


class SharedFile(Kept):
    """One file for all recordings, in each format. JSON lines grow as the work goes on, the others are written at the end."""

    def __init__(
        self,
        recordings: Sequence[Path],
        output_file: Path,
        formats: Sequence[OutputFormat],
        layout: Layout,
        mine: Ranks,
    ) -> None:
        check_writable(output_file)
        self._files = shared_files(output_file, formats)
        for path in self._files.values():
            check_writable(path)
        self._recordings = recordings
        self._layout = layout
        self._whole = False
        lasting = self._files["jsonl"] if list(self._files) == ["jsonl"] else None
        super().__init__(output_file, output_file, mine, recordings, lasting=lasting, layout=repr(layout))

    def claim(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        self._whole = self.begin(settings, list(self._files.values()), overwrite=overwrite)

    def left(self) -> list[Path]:
        if self._whole:
            return []
        done = self.finished()
        return [path for path in share(self._recordings, self.mine) if str(path) not in done]

    def finish(self) -> int:
        if self._whole:
            return _nothing_left(self, len(self._recordings))
        with self.ending() as failed:
            if failed is None:
                return 0
            texts, wrong = self._write()
            if not wrong:
                for path in self.journals:
                    if path != self.lasting:
                        path.unlink(missing_ok=True)
        for path in self._files.values():
            _say_written(texts, wrong, path)
        return wrong

    def _write(self) -> tuple[int, int]:
        """Every format, in the order of the recordings. Returns how many of them have a text, and how many an error."""
        entries = read_entries(self.journals)
        chosen = [best(entries.get(str(path), ())) for path in self._recordings]
        if None in chosen:
            raise DataError(
                _(
                    "{path}: the text of {name} is missing, as if a journal beside it had been deleted. Run the same command again."
                ).format(path=self.place, name=self._recordings[chosen.index(None)])
            )
        rows = [entry for entry in chosen if entry is not None]
        if self.lasting:
            self._put_in_order(self.lasting, entries, rows)
        else:
            for form, path in self._files.items():
                several = len(rows) > 1 or form == "json"
                write_text_atomic(path, render(form, read_rows(rows), several=several, layout=self._layout))
            if not {"json", "jsonl"} & set(self._files):
                write_text_atomic(self.rows, render("jsonl", read_rows(rows), several=True, layout=self._layout))
        return sum(entry.text for entry in rows), sum(entry.failed for entry in rows)

    def _put_in_order(self, lasting: Path, entries: dict[str, list[Entry]], rows: Sequence[Entry]) -> None:
        """JSON lines keep the rows of recordings that this list does not name, before all others."""
        named = set(map(str, self._recordings))
        others = [entry for name, found in entries.items() if name not in named and (entry := best(found))]
        wanted = [*others, *rows]
        there = sorted((e for found in read_entries([lasting]).values() for e in found), key=lambda e: e.offset)
        if wanted != there:
            write_text_atomic(lasting, render("jsonl", read_rows(wanted), several=True, layout=self._layout))

    def _reopen(self) -> None:
        source = self._files.get("jsonl") or self._files.get("json") or self.rows
        if self.lasting or not source.exists() or any(path.exists() for path in self.journals):
            return
        text = read_text(source)
        try:
            rows = json.loads(text) if source == self._files.get("json") else map(json.loads, lines(text))
            write_text_atomic(self.part, render("jsonl", rows, several=True, layout=self._layout))
        except (ValueError, TypeError, AttributeError):
            raise self._of_unknown_origin(source) from None


class Folder(Kept):
    """A file for each recording and format. The journal only says which are there, and whose they are.

    It knows recordings by their absolute path: the same name in two folders is two recordings, also for who goes there first.
    """

    def __init__(
        self, recordings: Sequence[Path], output_dir: Path, formats: Sequence[OutputFormat], layout: Layout, mine: Ranks
    ) -> None:
        check_writable(output_dir, folder=True)
        self._names = {str(path): name for path, name in names(recordings).items()}
        self._places = {path: os.path.abspath(path) for path in self._names}  # noqa: PTH100 - half the time of Path's
        self._recordings = recordings
        self._formats = formats
        self._layout = layout
        self._whole = False
        places = [Path(self._places[str(path)]) for path in recordings]
        super().__init__(output_dir / ".resonance-transcribe", output_dir, mine, places)

    def claim(self, settings: dict[str, Any], *, overwrite: bool) -> None:
        files = [file for name in dict.fromkeys(self._names.values()) for file in self._files(name).values()]
        self._whole = self.begin(settings, files, overwrite=overwrite)

    def _files(self, name: str) -> dict[OutputFormat, Path]:
        return {form: self.place / f"{name}.{form}" for form in self._formats}

    def left(self) -> list[Path]:
        if self._whole:
            return []
        entries = read_entries(self.journals)
        return [path for path in share(self._recordings, self.mine) if not self._is_done(str(path), entries)]

    def _is_done(self, recording: str, entries: dict[str, list[Entry]]) -> bool:
        name = self._names[recording]
        found = entries.get(self._places[recording], ())
        written = any(entry.name == name and not entry.failed for entry in found)
        return written and all(path.exists() for path in self._files(name).values())

    def _refuse_to_replace(self) -> None:
        owners = {
            key(entry.name): place
            for place, found in read_entries(self.journals).items()
            for entry in found
            if entry.name is not None
        }
        taken = [
            (name, owner, place)
            for recording, name in self._names.items()
            if (owner := owners.get(key(name), place := self._places[recording])) != place
        ]
        if taken:
            name, owner, place = taken[0]
            raise DataError(
                _(
                    "{path} holds texts of other recordings with the same names ({count}): {name} is the text of {before}, and "
                    "would be replaced by that of {now}. Choose another folder; or add --overwrite, which replaces them."
                ).format(path=self.place, count=len(taken), name=name, before=owner, now=place)
            )

    def add(self, row: Row) -> None:
        recording = row["audio_path"]
        kept: Row = {"audio_path": self._places[recording]}
        if "text" in row:
            kept["name"] = self._names[recording]
            for form, path in self._files(kept["name"]).items():
                write_text_atomic(path, render(form, [row], several=False, layout=self._layout))
        super().add(kept | ({"error": row["error"]} if "error" in row else {}))

    def finish(self) -> int:
        if self._whole:
            return _nothing_left(self, len(self._recordings))
        with self.ending() as failed:
            if failed is None:
                return 0
        entries = read_entries(self.journals)
        texts = sum(
            any(entry.name == name for entry in entries.get(self._places[recording], ()))
            for recording, name in self._names.items()
        )
        _say_written(texts, failed, self.place)
        return failed


def _nothing_left(kept: Kept, count: int) -> int:
    if kept.mine.main:
        _say(_("{path} has all {count} texts already.").format(path=kept.shown, count=count))
    return 0


def _say_written(texts: int, failed: int, path: Path) -> None:
    message = _("{count} texts written to {path}").format(count=texts, path=printable(str(path)))
    if failed:
        message += _("; {count} recordings have an error").format(count=failed)
    _say(message)


def _say(text: str) -> None:
    print(encodable(text, sys.stdout))


def share(recordings: Sequence[Path], mine: Ranks) -> list[Path]:
    """Those of this process: each is transcribed once, and every `world`-th falls to one process."""
    return list(dict.fromkeys(recordings))[mine.rank :: mine.world]


def check_writable(path: Path, *, folder: bool = False) -> None:
    """Raise DataError now, not after hours of work, when `path` cannot be written, or written to."""
    inside = path if folder else path.parent
    try:
        inside.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=inside):
            pass
        if not folder and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise DataError(
            _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                path=path, reason=error.strerror or error
            )
        ) from error
