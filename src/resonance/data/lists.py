"""Lists of recordings as a source: held in little memory, or, where they are long or far away, read a few rows at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from resonance.data.addresses import is_address, join, open_place, parent, reaching, read_place
from resonance.data.formats import columns_of, read_json_lines, read_table_rows
from resonance.data.manifest import Manifest, Utterance
from resonance.data.rows import Resolver, path_resolver
from resonance.data.samples import Sample, Unit
from resonance.data.textfile import refuse_wrong_encoding
from resonance.errors import ManifestError
from resonance.messages import _

BLOCK_ROWS = 100  # neighbours in a list, often of one speaker, stay together: few, so that they mix
HELD_BYTES = 64 << 20  # shorter lists are read and checked whole before training
HEAD_BYTES = 1 << 16


class HeldList:
    """Rows in memory, a hundred together as bytes: objects would be copied page by page into every worker process."""

    def __init__(self, manifest: Manifest) -> None:
        self.name = str(manifest.path)
        rows = manifest.utterances
        blocks = [rows[first : first + BLOCK_ROWS] for first in range(0, len(rows), BLOCK_ROWS)]
        self.units = [Unit(self.name, len(block)) for block in blocks]
        self.blocks = [pickle.dumps(block) for block in blocks]  # made and read by this program alone
        known = [row.duration for row in rows]
        self.seconds = None if None in known else sum(seconds or 0.0 for seconds in known)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for block in self.blocks:
            for row in pickle.loads(block):
                digest.update(f"{Path(row.audio).name}|{row.start}|{row.end}|{row.text}\n".encode())
        return digest.hexdigest()

    def read(self, unit: int, numbers: range) -> Iterator[Sample]:
        rows: list[Utterance] = pickle.loads(self.blocks[unit])
        for number in numbers[: _within(numbers, len(rows))]:
            yield Sample(rows[number], unit=unit, number=number)


class _Block(NamedTuple):
    offset: int  # bytes into the file
    size: int  # bytes
    line: int  # number of the first line, from 1
    rows: int


class LineList:
    """JSON lines or a table, of which a process holds a hundred rows at a time."""

    def __init__(self, place: str, dataset_dir: Path | None, head: str, stream_lines: Iterator[bytes]) -> None:
        self.name = place
        self.dataset_dir = dataset_dir
        self.table: tuple[str, list[str]] | None = None if head.lstrip().startswith("{") else columns_of(place, head)
        self.seconds = None
        digest = hashlib.sha256()
        self.blocks = list(_blocks(stream_lines, self.table, digest.update))
        self.digest = digest.hexdigest()
        self.units = [Unit(place, block.rows) for block in self.blocks]
        if not self.units:
            raise ManifestError(_("{path}: there are no rows in it. List at least one recording.").format(path=place))

    def fingerprint(self) -> str:
        return self.digest

    def read(self, unit: int, numbers: range) -> Iterator[Sample]:
        block = self.blocks[unit]
        data = read_place(self.name, block.offset, block.offset + block.size)
        refuse_wrong_encoding(self.name, data)
        text = data.decode("utf-8-sig" if not block.offset else "utf-8")
        problems: list[str] = []
        resolve = _resolver(self.name, self.dataset_dir)
        if self.table is None:
            rows = read_json_lines(text, resolve, problems, block.line)
        else:
            rows = read_table_rows(text, *self.table, resolve, problems, block.line)
        if problems:
            fault = f"{self.name}: {'; '.join(problems)}"
            yield Sample(Utterance(self.name, "", block.line), None, fault, unit, numbers.start)
        for number in numbers[: _within(numbers, len(rows))]:
            yield Sample(rows[number], unit=unit, number=number)


def open_lines(place: str, dataset_dir: Path | None) -> LineList | None:
    """The list at `place`, if it is one to be read by lines and too long to be held, or on another machine."""
    if not is_address(place) and (not Path(place).is_file() or Path(place).stat().st_size < HELD_BYTES):
        return None
    with open_place(place) as stream:
        head_bytes = stream.read(HEAD_BYTES)
        cut = head_bytes.rfind(b"\n") + 1 or len(head_bytes)
        refuse_wrong_encoding(place, head_bytes[:cut])
        head = head_bytes[:cut].decode("utf-8-sig")
        if not head.strip() or head.lstrip().startswith("[") or not _one_row_a_line(head):
            if is_address(place):
                raise ManifestError(
                    _(
                        "{place}: a list on another machine must have one row a line: JSON lines, CSV or TSV. Download it and "
                        "give its path, or write it in one of these."
                    ).format(place=place)
                )
            return None
        stream.seek(0)
        with reaching(place):
            return LineList(place, dataset_dir, head, iter(stream))


@functools.cache  # made in each process: workers may be started afresh
def _resolver(place: str, dataset_dir: Path | None) -> Resolver:
    folder = parent(place)
    if is_address(place):
        return lambda name: join(folder, name.replace("\\", "/"))
    extra = [dataset_dir] if dataset_dir else []
    return path_resolver([path for one in (Path(folder), *extra) for path in (one, one / "clips")])


def _one_row_a_line(head: str) -> bool:
    first = head.lstrip().partition("\n")[0]
    if not first.startswith("{"):
        return True
    try:
        return isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _blocks(
    file_lines: Iterator[bytes], table: tuple[str, Sequence[str]] | None, see: Callable[[bytes], None]
) -> Iterator[_Block]:
    """Where each hundred rows begin. In CSV a row ends only where all quotes are closed."""
    quoting = table is not None and table[0] != "\t"
    offset = begin = rows = quotes = 0
    line, first = 0, 1
    for data in file_lines:
        see(data)
        line += 1
        offset += len(data)
        if table is not None and line == 1:
            begin, first = offset, 2
            continue
        if quoting:
            quotes += data.count(b'"')
        if quotes % 2 == 0 and data.strip():
            rows += 1
        if rows == BLOCK_ROWS and quotes % 2 == 0:
            yield _Block(begin, offset - begin, first, rows)
            begin, first, rows = offset, line + 1, 0
    if rows or quotes % 2:
        yield _Block(begin, offset - begin, first, max(rows, 1))


def _within(numbers: range, count: int) -> int:
    """How many of `numbers` are below `count`."""
    return len(range(numbers.start, min(numbers.stop, count), numbers.step))
