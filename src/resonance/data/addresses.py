"""Files on this machine and elsewhere by one interface: `s3://`, `gs://`, `https://` and whatever else fsspec reaches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from resonance.errors import DataError, MissingExtraError, ResonanceError, ShardError, UnreachableError
from resonance.messages import _

READ_AHEAD_BYTES = 8 << 20  # asked for at once where a file is read from its beginning on


class Entry(NamedTuple):
    """One file of a folder."""

    name: str
    size: int


def is_address(place: str | Path) -> bool:
    return "://" in str(place)


def join(folder: str, name: str) -> str:
    """The place of `name` inside `folder`; `name` itself where it is a place already."""
    if is_address(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_address(folder) else str(Path(folder) / name)


def parent(place: str) -> str:
    return place.rstrip("/").rpartition("/")[0] if is_address(place) else str(Path(place).parent)


def base_name(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2] if is_address(place) else Path(place).name


@contextlib.contextmanager
def reaching(place: str) -> Iterator[None]:
    """What goes wrong with files inside the block as one error that names `place` and says what to do."""
    try:
        yield
    except ResonanceError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or is_address(place):
            raise _explained(place, error) from error
        raise


@contextlib.contextmanager
def open_place(place: str) -> Iterator[BinaryIO]:
    """The file at `place`, open for reading from its beginning on, seekable."""
    with reaching(place):
        if not is_address(place):
            with Path(place).open("rb") as stream:
                yield stream
            return
        system, path = _system(place)
        with system.open(path, "rb", block_size=READ_AHEAD_BYTES, cache_type="readahead") as remote:
            yield cast(BinaryIO, remote)


def read_place(place: str, start: int = 0, end: int | None = None) -> bytes:
    """The file at `place`, or its bytes from `start` to `end`."""
    with reaching(place):
        if not is_address(place):
            with Path(place).open("rb") as stream:
                stream.seek(start)
                return stream.read(-1 if end is None else end - start)
        system, path = _system(place)
        return cast(bytes, system.cat_file(path, start=start or None, end=end))


def files_in(folder: str) -> list[Entry]:
    """The files directly inside `folder`, by name. Raises ShardError when it is not there or may not be read."""
    with reaching(folder):
        if not is_address(folder):
            found = [Entry(path.name, path.stat().st_size) for path in Path(folder).iterdir() if path.is_file()]
        else:
            system, path = _system(folder)
            listed = system.ls(path, detail=True)
            files = (one for one in listed if one["type"] == "file")
            found = [Entry(base_name(f"//{one['name']}"), int(one["size"] or 0)) for one in files]
    return sorted(found)


def is_folder(place: str) -> bool:
    """Whether `place` is a folder. Raises ShardError where nobody can tell: no credentials, no such bucket."""
    if not is_address(place):
        return Path(place).is_dir()
    with reaching(place):
        system, path = _system(place)
        return bool(system.info(path)["type"] == "directory")


def _system(place: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. Asked for anew each time: what a parent process opened
    does not work in its workers."""
    import fsspec

    system, path = fsspec.core.url_to_fs(place)
    return system, path


def _explained(place: str, error: Exception) -> DataError | MissingExtraError:
    if isinstance(error, ImportError):
        return MissingExtraError(
            _(
                "{place}: reading from there needs a package that is not installed ({reason}). For s3://: "
                'pip install "resonance-asr[s3]"'
            ).format(place=place, reason=error)
        )
    kind = type(error).__name__
    if isinstance(error, PermissionError) or "Credentials" in kind or "Token" in kind:
        if is_address(place):
            return ShardError(
                _(
                    "{place}: access was refused ({reason}). Check the credentials: for s3://, AWS_PROFILE or "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may read this bucket."
                ).format(place=place, reason=error)
            )
        return ShardError(_("{place}: you have no permission to read this. Ask its owner.").format(place=place))
    if isinstance(error, FileNotFoundError):
        return ShardError(
            _("{place}: not there. Check the spelling, for an address of the bucket too.").format(place=place)
        )
    reason = getattr(error, "strerror", None) or error or kind
    known = UnreachableError if is_address(place) else ShardError
    return known(_("{place}: cannot be read ({reason}).").format(place=place, reason=reason))
