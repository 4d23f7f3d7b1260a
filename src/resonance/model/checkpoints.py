"""Checkpoints that can be trusted: each says of itself, last of all, what it is made of, and is checked before it is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

COMPLETE_FILE = "complete.json"  # the last file written into a checkpoint: size and SHA-256 of all others
PROCESSES_FILE = "processes"  # how many trained together
DAMAGED_FILE = "damaged.json"  # its name where one of them is not as it was written


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and still has all its files, in their sizes."""
    try:
        contents = _contents(checkpoint)
        return all((checkpoint / name).stat().st_size == size for name, (size, _digest) in contents.items())
    except (OSError, ValueError):
        return False


def mark_complete(checkpoint: Path) -> None:
    """Put every file of a checkpoint on the disk, then say so in a file of its own."""
    names = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != COMPLETE_FILE)
    for file in names:
        _fsync(file)
    contents = {p.relative_to(checkpoint).as_posix(): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in names}
    temporary = checkpoint / f"{COMPLETE_FILE}.part"
    temporary.write_text(json.dumps(contents, indent=1), encoding="utf-8")
    _fsync(temporary)
    temporary.replace(checkpoint / COMPLETE_FILE)
    _fsync_folder(checkpoint)
    _fsync_folder(checkpoint.parent)


def processes_of(checkpoint: Path) -> int:
    """How many processes trained together when it was written."""
    try:
        return int((checkpoint / PROCESSES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of an earlier version: each process left its random state there
        return max(1, len([*checkpoint.glob("rng_state_*.pth")]))


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    folders = (f for f in checkpoints.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit())
    return sorted(int(f.name.removeprefix("checkpoint-")) for f in folders if is_complete(f))


def rotate(checkpoints: Path, keep: int | None, protected: Iterable[Path]) -> None:
    """Delete the oldest complete checkpoints beyond `keep`, never those in `protected`. (transformers counts folders that a
    kill has left half-written too, and deletes whole ones in their place.)"""
    if keep is None:
        return
    folders = [checkpoints / f"checkpoint-{step}" for step in complete_steps(checkpoints)]
    spared = {folder.name for folder in protected}
    too_many = len(folders) - keep
    for folder in [folder for folder in folders if folder.name not in spared][: max(too_many, 0)]:
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Make it no longer complete; nothing of it is deleted."""
    (checkpoint / COMPLETE_FILE).replace(checkpoint / DAMAGED_FILE)


def set_aside_damaged(checkpoints: Path) -> Iterator[tuple[Path, str]]:
    """Take from the complete checkpoints, the newest first, those with a changed file, up to the first sound one.

    Yields each with the name of the file. They are no longer complete then, and are kept.
    """
    for step in reversed(complete_steps(checkpoints)):
        folder = checkpoints / f"checkpoint-{step}"
        file = changed_file(folder)
        if file is None:
            return
        set_aside(folder)
        yield folder, file


def changed_file(checkpoint: Path) -> str | None:
    """The first file of a complete checkpoint that does not hold what was written, None where all do."""
    for name, (_size, digest) in _contents(checkpoint).items():
        if digest is not None and _sha256(checkpoint / name) != digest:
            return name
    return None


def _contents(checkpoint: Path) -> dict[str, tuple[int, str | None]]:
    """Size and digest of each file; the digest is None where an earlier version of Resonance wrote only sizes."""
    found: dict[str, Any] = json.loads((checkpoint / COMPLETE_FILE).read_text(encoding="utf-8"))
    return {
        name: (value, None) if isinstance(value, int) else (value["bytes"], value["sha256"])
        for name, value in found.items()
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _fsync_folder(folder: Path) -> None:
    """The names in a folder, too, have to reach the disk; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
