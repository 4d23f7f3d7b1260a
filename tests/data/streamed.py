"""Tar files and streams for tests."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from resonance.data.manifest import Manifest, Utterance
from resonance.data.samples import Sample, Source
from resonance.data.stream import Drawn, Reader, Reading, Standing


def wav(seconds: float = 0.3, pitch: float = 300.0) -> bytes:
    tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * 16_000)) / 16_000)
    file = io.BytesIO()
    soundfile.write(file, tone, 16_000, format="WAV")
    return file.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def clips(first: int, count: int, **more: object) -> list[tuple[str, bytes]]:
    """Members of `count` samples whose texts are their numbers."""
    members = []
    for i in range(first, first + count):
        row: Mapping[str, object] = {"text": f"clip {i}", **more}
        members += [(f"{i:04}.wav", wav(0.2 + 0.01 * (i % 7))), (f"{i:04}.json", json.dumps(row).encode())]
    return members


def manifest(count: int) -> Manifest:
    """Rows with durations whose files nobody opens."""
    rows = [Utterance(f"{i}.wav", f"clip {i}", i + 1, duration=1.0 + i % 13) for i in range(count)]
    return Manifest(Path("list.jsonl"), "JSON lines", rows)


def keep(sample: Sample) -> Sample:
    row = sample.utterance
    return sample if row.duration else sample._replace(utterance=replace(row, duration=1.0))


def reader(source: Source, number: int, readers: int, *, group: int = 4, buffer: int = 20, seed: int = 1) -> Reader:
    return Reader(source, Reading(seed, number, readers, group, buffer), keep)


def texts(group: Sequence[Drawn]) -> list[tuple[int, str]]:
    return [(drawn.epoch, drawn.sample.utterance.text) for drawn in group]


def heard(one: Reader, until_epoch: int, standing: Standing | None = None) -> list[tuple[int, str]]:
    """What a reader gives until nothing of the epochs before `until_epoch` can follow."""
    found: list[tuple[int, str]] = []
    for group, _standing in one.groups(standing or Standing()):
        if all(drawn.epoch >= until_epoch for drawn in group) and _standing.start.epoch >= until_epoch:
            return found
        found += texts(group)
    raise AssertionError("a stream has no end")
