"""`resonance data shard`: recordings into tar files in WebDataset's layout, to be streamed.

Shards appear one by one, each complete, and `index.json` last. A run that was stopped goes on behind its last complete shard and
ends with the same files as one that was not: order, names and every byte are a function of recordings and settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from pydantic import BaseModel, ValidationError

from resonance.data.addresses import base_name, read_place
from resonance.data.audio import read_audio
from resonance.data.convert import MEDIA_SUFFIX
from resonance.data.samples import Sample, Source
from resonance.data.saved_dataset import suffix_of
from resonance.data.shard_index import INDEX_FILE, Index, Shard, write_index
from resonance.data.textfile import write_text_atomic
from resonance.errors import DataError
from resonance.messages import _
from resonance.units import SAMPLE_RATE

PROGRESS_FILE = "shards.part.jsonl"  # settings, then a line for each complete shard; goes when the index is written
SHARD_STEM = "clips-"
HASHED_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """When a shard is full, and in which order recordings are written."""

    max_bytes: int
    max_clips: int | None
    seed: int
    skip_broken: bool


@dataclass(frozen=True, slots=True)
class ShardSummary:
    index: Index
    reused: int  # shards that an earlier run had written
    left_out: tuple[str, ...]  # reasons


class _Written(BaseModel):
    """A complete shard, and how far the source had been read then."""

    shard: Shard
    read: int  # samples of the source, also those left out
    left_out: tuple[str, ...]  # of all until then


class _Recording(NamedTuple):
    sample: Sample
    content: bytes  # of an audio file
    ending: str


def write_shards(
    source: Source, out: Path, settings: ShardSettings, progress: Callable[[int], None] = lambda done: None
) -> ShardSummary:
    """Write all recordings of `source` to tar files in `out`, in an order drawn by the seed; a hundred neighbours of a
    list stay together, and mix when they are streamed.

    Files are copied as they are; spans of longer files are cut and stored as 16-bit FLAC at 16 kHz. `progress` is told how
    many more samples are done. Raises DataError where `out` holds anything else than an earlier part of the same, and for a
    recording that cannot be read unless `settings.skip_broken`.
    """
    made_of = {"source": source.fingerprint(), **asdict(settings)}
    try:
        done = _begin(out, made_of)
        shards = [written.shard for written in done]
        recordings = _Recordings(source, settings, done[-1] if done else None, progress)
        for first in recordings:
            shards.append(_write_shard(out, len(shards), first, recordings, settings))
            written = _Written(shard=shards[-1], read=recordings.read, left_out=tuple(recordings.left_out))
            _append(out / PROGRESS_FILE, written.model_dump())
        if not shards:
            raise DataError(_("{place}: nothing in it that can be written.").format(place=source.name))
        index = write_index(out / INDEX_FILE, shards)
        (out / PROGRESS_FILE).unlink()
    except OSError as error:
        raise DataError(
            _("{path}: cannot be written ({reason}). Free some space, then run the same command: it goes on.").format(
                path=out, reason=error.strerror or error
            )
        ) from error
    return ShardSummary(index, len(done), tuple(recordings.left_out))


def _begin(out: Path, made_of: dict[str, Any]) -> list[_Written]:
    """The complete shards of an earlier run, their checksums compared. What it was writing when it stopped is removed."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / PROGRESS_FILE
    names = {entry.name for entry in out.iterdir()}
    if not path.is_file():
        if names:
            raise DataError(_("{out}: not empty. Give a new folder.").format(out=out))
        _append(path, made_of)
        return []
    first, *others = path.read_text(encoding="utf-8").splitlines() or [""]
    if first and first != json.dumps(made_of):
        raise DataError(
            _(
                "{out}: was begun with other recordings or settings. Give those again, or a new folder for these."
            ).format(out=out)
        )
    done: list[_Written] = []
    for line in others:
        try:
            written = _Written.model_validate_json(line)
            if _checksum(out / written.shard.name) != written.shard.sha256:
                break
        except (ValidationError, FileNotFoundError):  # torn when the run was killed
            break
        done.append(written)
    lines = [made_of, *(written.model_dump() for written in done)]
    write_text_atomic(path, (json.dumps(line) + "\n" for line in lines))
    for stale in names - {written.shard.name for written in done}:
        if stale.startswith(SHARD_STEM):
            (out / stale).unlink()
    return done


class _Recordings:
    """An iterator over what can be written, in the order of the seed, behind what was read before."""

    def __init__(
        self, source: Source, settings: ShardSettings, last: _Written | None, progress: Callable[[int], None]
    ) -> None:
        self.read = 0
        self.left_out = list(last.left_out) if last else []
        self._found = self._all(source, settings, last.read if last else 0, progress)

    def __iter__(self) -> Iterator[_Recording]:
        return self

    def __next__(self) -> _Recording:
        return next(self._found)

    def _all(
        self, source: Source, settings: ShardSettings, behind: int, progress: Callable[[int], None]
    ) -> Iterator[_Recording]:
        for unit in np.random.default_rng(settings.seed).permutation(len(source.units)).tolist():
            rows = source.units[unit].rows
            numbers = range(sys.maxsize if rows is None else rows)
            if rows is not None:  # what was written before need not be read
                before = min(max(behind - self.read, 0), rows)
                self.read += before
                progress(before)
                numbers = numbers[before:]
            for sample in source.read(unit, numbers):
                self.read += 1
                progress(1)
                if self.read <= behind:
                    continue
                try:
                    yield _recording(sample)
                except DataError as error:
                    if not settings.skip_broken:
                        raise DataError(
                            _(
                                "{reason} Correct it, or leave such recordings out with --skip_broken "
                                "(`resonance data check` finds all of them)."
                            ).format(reason=error)
                        ) from error
                    self.left_out.append(str(error))


def _recording(sample: Sample) -> _Recording:
    """With its length as its file says. Raises DataError."""
    if sample.fault:
        raise DataError(sample.fault)
    here = sample.fetched()
    measured = here._replace(utterance=replace(here.utterance, duration=None)).timed()
    return _Recording(measured, *_content(measured))


def _content(sample: Sample) -> tuple[bytes, str]:
    """The audio file's bytes and ending; of a span, the span alone."""
    row = sample.utterance
    if row.start or row.end is not None:
        audio = read_audio(row.audio, row.start, row.end, data=sample.data)
        file = io.BytesIO()
        soundfile.write(file, audio, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        return file.getvalue(), ".flac"
    data = read_place(row.audio) if sample.data is None else sample.data
    ending = Path(base_name(row.audio)).suffix.lower()
    return data, ending if MEDIA_SUFFIX.fullmatch(ending) else suffix_of(data)


def _write_shard(
    out: Path, number: int, first: _Recording, more: Iterator[_Recording], settings: ShardSettings
) -> Shard:
    name = f"{SHARD_STEM}{number:06}.tar"
    temporary = out / f"{name}.part"
    size = samples = 0
    seconds = 0.0
    try:
        with temporary.open("wb") as stream:
            with tarfile.TarFile(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
                found: _Recording | None = first
                while found:
                    sample, data, ending = found
                    key = f"{number:06}-{samples:06}"
                    _add(archive, f"{key}{ending}", data)
                    _add(archive, f"{key}.json", json.dumps(_beside(sample), ensure_ascii=False).encode())
                    samples, size = samples + 1, size + len(data)
                    seconds += sample.utterance.duration or 0.0
                    full = size >= settings.max_bytes or samples == settings.max_clips
                    found = None if full else next(more, None)
            stream.flush()
            os.fsync(stream.fileno())
        shard = Shard(
            name=name,
            samples=samples,
            bytes=temporary.stat().st_size,
            sha256=_checksum(temporary),
            seconds=round(seconds, 3),
        )
        temporary.replace(out / name)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return shard


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time and owner stay zero: the same content is the same file
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _beside(sample: Sample) -> dict[str, object]:
    """What is written beside a recording, in the keys of manifests."""
    row = sample.utterance
    values: dict[str, object] = {"text": row.text, "duration": row.duration}
    for key in ("language", "speaker"):
        if (value := getattr(row, key)) is not None:
            values[key] = value
    if row.segments:
        values["sentences"] = [{"start": s.start, "end": s.end, "text": s.text} for s in row.segments]
    return values


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def _append(path: Path, values: object) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
