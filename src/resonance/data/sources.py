"""What can be streamed, found by looking: tar shards, parquet files, Hugging Face datasets, and every list of recordings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from resonance.data.addresses import Entry, base_name, files_in, is_address, is_folder, join, parent, read_place
from resonance.data.formats import load_manifest
from resonance.data.lists import HeldList, open_lines
from resonance.data.samples import Sample, Source, Unit
from resonance.data.saved_dataset import is_saved_dataset
from resonance.data.shard_index import INDEX_FILE, Index, parse_index
from resonance.data.tars import count_tar, read_tar
from resonance.errors import DataError, ShardError
from resonance.messages import _

Warn = Callable[[str], None]

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
LONG_LIST_BYTES = 256 << 20  # about a million rows
LISTED = 5  # missing shards named in one message


def open_source(
    place: str | Path,
    *,
    dataset_dir: Path | None = None,
    json_file: str | None = None,
    skip_broken: bool = False,
    warn: Warn = lambda text: None,
) -> Source:
    """The source at `place`: a file, a folder, an address or the name of a dataset.

    Parts that are missing or damaged raise ShardError, all named; with `skip_broken` they are left out and `warn` is told.
    """
    text = str(place)
    if json_file is not None:
        return HeldList(load_manifest(place, dataset_dir=dataset_dir, json_file=json_file, addresses=True))
    if text.endswith(".tar"):
        return _tars(text, [join(parent(text), name) for name in _expanded(base_name(text))], None, skip_broken, warn)
    if text.endswith(".parquet"):
        from resonance.data.parquet import ParquetFiles

        return ParquetFiles(text, [text])
    if base_name(text) == INDEX_FILE:
        text = parent(text)
    if not is_address(text) and not Path(text).exists() and _HUB_NAME.fullmatch(text):
        from resonance.data.hub_dataset import open_hub

        return open_hub(text)
    if is_folder(text):
        return _folder(text, dataset_dir, skip_broken, warn)
    return open_lines(text, dataset_dir) or HeldList(load_manifest(text, dataset_dir=dataset_dir, addresses=True))


def looks_streamed(place: str | Path) -> str | None:
    """Why a training on `place` has to stream, in words; None where all of it can be listed first."""
    text = str(place)
    if is_address(text):
        return _("lies on another machine")
    path = Path(text)
    if text.endswith(".tar") or path.name == INDEX_FILE or (path.is_dir() and any(path.glob("*.tar"))):
        return _("tar shards")
    if text.endswith(".parquet") or (path.is_dir() and _has_parquet(path)):
        return _("parquet files")
    if path.is_file() and path.stat().st_size > LONG_LIST_BYTES:
        return _("a list too long to be held in memory")
    return None


def _has_parquet(folder: Path) -> bool:
    return any(folder.glob("*.parquet")) or any(folder.glob("data/*.parquet"))


def _folder(place: str, dataset_dir: Path | None, skip_broken: bool, warn: Warn) -> Source:
    entries = files_in(place)
    names = [entry.name for entry in entries]
    tars = [entry for entry in entries if entry.name.endswith(".tar")]
    if INDEX_FILE in names:
        path = join(place, INDEX_FILE)
        return _indexed(place, parse_index(read_place(path), path), entries, skip_broken, warn)
    if tars:
        return _tars(place, [join(place, tar.name) for tar in tars], tars, skip_broken, warn)
    if not is_address(place) and is_saved_dataset(Path(place)):
        from resonance.data.hub_dataset import open_saved

        return open_saved(Path(place))
    if found := _parquet_files(place, names):
        from resonance.data.parquet import ParquetFiles

        return ParquetFiles(place, found)
    if is_address(place):
        raise DataError(
            _("{place}: neither tar shards nor parquet files are in it. Give the list of recordings itself.").format(
                place=place
            )
        )
    return HeldList(load_manifest(place, dataset_dir=dataset_dir, addresses=True))


def _parquet_files(place: str, names: Sequence[str]) -> list[str]:
    """The parquet files of a folder; of a dataset as the hub keeps it, those of its training part."""
    found = [join(place, name) for name in names if name.endswith(".parquet")]
    folder = join(place, "data")
    if not found and (is_address(place) or Path(folder).is_dir()):
        try:
            found = [join(folder, entry.name) for entry in files_in(folder) if entry.name.endswith(".parquet")]
        except ShardError:
            return []
    return [path for path in found if base_name(path).startswith("train")] or found


def _expanded(name: str) -> list[str]:
    """The names behind `clips-{000..012}.tar`, as WebDataset writes them."""
    found = _RANGE.search(name)
    if found is None:
        return [name]
    first, last = int(found[1]), int(found[2])
    numbers = (f"{number:0{len(found[1])}}" for number in range(first, last + 1))
    return [n for number in numbers for n in _expanded(name[: found.start()] + number + name[found.end() :])]


def _indexed(place: str, index: Index, entries: Sequence[Entry], skip_broken: bool, warn: Warn) -> Source:
    """The shards of an index. Broken ones that are skipped keep their place: the order of the others stays as it was."""
    sizes = {entry.name: entry.size for entry in entries}
    broken = {}
    for shard in index.shards:
        if shard.name not in sizes:
            broken[shard.name] = _("{shard} is missing").format(shard=shard.name)
        elif sizes[shard.name] != shard.bytes:
            broken[shard.name] = _(
                "{shard} has {found} bytes, the index says {expected}: it is cut off or was changed"
            ).format(shard=shard.name, found=sizes[shard.name], expected=shard.bytes)
    _tell_broken(place, list(broken.values()), skip_broken, warn)
    units = [Unit(join(place, shard.name), shard.samples) for shard in index.shards]
    return TarShards(place, units, index.seconds, [shard.sha256 for shard in index.shards])


def _tars(place: str, tars: Sequence[str], entries: Sequence[Entry] | None, skip_broken: bool, warn: Warn) -> Source:
    """Tar files without an index. Those on this machine are counted, which also finds the damaged ones."""
    broken, units, marks = [], [], []
    for i, tar in enumerate(tars):
        try:
            units.append(Unit(tar, None if is_address(tar) else count_tar(tar)))
        except ShardError as error:
            broken.append(str(error))
        else:
            marks.append(f"{base_name(tar)} {entries[i].size if entries else units[-1].rows}")
    _tell_broken(place, broken, skip_broken, warn)
    return TarShards(place, units, None, marks)


def _tell_broken(place: str, broken: Sequence[str], skip_broken: bool, warn: Warn) -> None:
    if not broken:
        return
    shown = "; ".join(broken[:LISTED])
    if len(broken) > LISTED:
        shown += "; " + _("… and {count} more").format(count=len(broken) - LISTED)
    if skip_broken:
        warn(_("{place}: left out {count} shards: {names}").format(place=place, count=len(broken), names=shown))
        return
    raise ShardError(
        _(
            "{place}: {count} shards cannot be used: {names}. Copy them again, or leave them out with --skip_broken."
        ).format(place=place, count=len(broken), names=shown)
    )


class TarShards:
    """Tar files, each a unit."""

    def __init__(self, name: str, units: Sequence[Unit], seconds: float | None, marks: Sequence[str]) -> None:
        self.name = name
        self.units = units
        self.seconds = seconds
        self.marks = marks

    def fingerprint(self) -> str:
        names = (base_name(unit.name) for unit in self.units)
        lines = "\n".join(f"{name} {mark}" for name, mark in zip(names, self.marks, strict=True))
        return hashlib.sha256(lines.encode()).hexdigest()

    def read(self, unit: int, numbers: range) -> Iterator[Sample]:
        return read_tar(self.units[unit].name, unit, numbers)
