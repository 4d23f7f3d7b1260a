"""A folder on this machine or behind an address, as a store of adapters needs it: what appears there is whole.

Paths are relative, with `/`. FileNotFoundError means that something is not there; whatever else goes wrong is an error of
Resonance that names the place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, cast

from resonance.data.addresses import is_address, reaching
from resonance.errors import DataError
from resonance.messages import _

_PART = ".part"
_STALE_SECONDS = 3600.0


class File(NamedTuple):
    size: int
    sign: str  # another one when the file has changed


class Place(Protocol):
    def read(self, path: str) -> bytes: ...

    def write(self, path: str, data: bytes) -> None:
        """Replace the file, which is the old or the new one at any moment."""
        ...

    def put(self, folder: str, files: Mapping[str, Path | bytes]) -> None:
        """Write a folder that was not there. It is complete when this returns; the last file appears last."""
        ...

    def files(self, folder: str) -> dict[str, File]:
        """The files in a folder by name; none where there is no such folder."""
        ...

    def folders(self, folder: str) -> list[str]:
        """Names of the folders in a folder, in any order."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file or a folder, if it is there. A folder is gone at once or, behind an address, file by file."""
        ...

    def fetched(self, folder: str, endings: frozenset[str]) -> contextlib.AbstractContextManager[Path]:
        """The files of a folder with these endings on this machine, for as long as the block lasts."""
        ...


def open_folder(place: str) -> Place:
    """Raises DataError where there is no such folder, and ShardError where it cannot be reached."""
    if is_address(place):
        return RemoteFolder(place)
    return LocalFolder(Path(place))


class LocalFolder:
    def __init__(self, root: Path) -> None:
        self.root = root
        if not root.is_dir():
            raise DataError(_("{place}: no such folder. Create it, or correct --adapters.").format(place=root))

    def read(self, path: str) -> bytes:
        with _reaching(self.root / path):
            return (self.root / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}{_PART}")
        with self._writing(path):
            _remove_stale(target.parent)
            try:
                _write(temporary, data)
                temporary.replace(target)
                _sync_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def put(self, folder: str, files: Mapping[str, Path | bytes]) -> None:
        target = self.root / folder
        temporary = target.with_name(f".{uuid.uuid4().hex}{_PART}")
        with self._writing(folder):
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync_folder(target.parent.parent)
            _remove_stale(target.parent)
            try:
                temporary.mkdir()
                for name, content in files.items():
                    _write(temporary / name, content)
                _sync_folder(temporary)
                temporary.rename(target)
                _sync_folder(target.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def files(self, folder: str) -> dict[str, File]:
        found = {}
        for entry in self._entries(folder):
            with contextlib.suppress(OSError):  # gone since, or a link that leads nowhere
                if entry.is_file():
                    stat = entry.stat()
                    found[entry.name] = File(stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}")
        return found

    def folders(self, folder: str) -> list[str]:
        return [entry.name for entry in self._entries(folder) if _is_folder(entry)]

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with _reaching(self.root / folder), os.scandir(self.root / folder) as entries:
                return list(entries)
        except FileNotFoundError:
            return []

    def remove(self, path: str) -> None:
        target = self.root / path
        with self._writing(path):
            if target.is_symlink() or target.is_file():
                target.unlink(missing_ok=True)
            elif target.is_dir():
                aside = target.with_name(f".{uuid.uuid4().hex}{_PART}")
                target.rename(aside)
                _sync_folder(target.parent)
                _remove_stale(target.parent)
                shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def fetched(self, folder: str, endings: frozenset[str]) -> Iterator[Path]:
        yield self.root / folder

    @contextlib.contextmanager
    def _writing(self, path: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                    path=self.root / path, reason=error.strerror or error
                )
            ) from error


class RemoteFolder:
    def __init__(self, address: str) -> None:
        import fsspec

        self.address = address.rstrip("/")
        with reaching(address):
            # What another machine has written since would not be seen in a listing that is kept.
            self.system, self.root = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
            try:
                self.system.ls(self.root, detail=False)
            except FileNotFoundError:  # object stores have no empty folders: the bucket must be there
                if "/" in self.root.strip("/"):
                    self.system.ls(self.root.strip("/").partition("/")[0], detail=False)

    def read(self, path: str) -> bytes:
        with _reaching(self._full(path)):
            return cast(bytes, self.system.cat_file(self._path(path)))

    def write(self, path: str, data: bytes) -> None:
        with _reaching(self._full(path)):
            self.system.pipe_file(self._path(path), data)

    def put(self, folder: str, files: Mapping[str, Path | bytes]) -> None:
        with _reaching(self._full(folder)):
            for name, content in files.items():
                target = self._path(f"{folder}/{name}")
                if isinstance(content, bytes):
                    self.system.pipe_file(target, content)
                else:
                    self.system.put_file(str(content), target)

    def files(self, folder: str) -> dict[str, File]:
        return {
            PurePosixPath(one["name"]).name: File(int(one["size"] or 0), _digest(one))
            for one in self._list(folder)
            if one["type"] == "file"
        }

    def folders(self, folder: str) -> list[str]:
        return [PurePosixPath(one["name"]).name for one in self._list(folder) if one["type"] == "directory"]

    def remove(self, path: str) -> None:
        with _reaching(self._full(path)), contextlib.suppress(FileNotFoundError):
            self.system.rm(self._path(path), recursive=True)

    @contextlib.contextmanager
    def fetched(self, folder: str, endings: frozenset[str]) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="resonance-adapter-") as local:
            for name in self.files(folder):
                if PurePosixPath(name).suffix in endings:
                    with _reaching(self._full(f"{folder}/{name}")):
                        self.system.get_file(self._path(f"{folder}/{name}"), str(Path(local) / name))
            yield Path(local)

    def _list(self, folder: str) -> list[dict[str, Any]]:
        try:
            with _reaching(self._full(folder)):
                return cast(list[dict[str, Any]], self.system.ls(self._path(folder), detail=True))
        except FileNotFoundError:
            return []

    def _path(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _full(self, path: str) -> str:
        return f"{self.address}/{path}" if path else self.address


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


@contextlib.contextmanager
def _reaching(place: object) -> Iterator[None]:
    """As `reaching`, but that something is not there is for the caller to judge."""
    missing = None
    with reaching(str(place)):
        try:
            yield
        except (FileNotFoundError, NotADirectoryError) as error:
            missing = error
    if missing is not None:
        raise FileNotFoundError(str(place)) from missing


def _digest(entry: Mapping[str, Any]) -> str:
    """Of what a file system says of a file: size, time, ETag or generation, by their own names."""
    return hashlib.sha256(repr(sorted(entry.items(), key=lambda item: item[0])).encode()).hexdigest()


def _write(path: Path, content: Path | bytes) -> None:
    with path.open("wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove_stale(folder: Path) -> None:
    """What a process that was killed left behind."""
    for path in folder.glob(f".*{_PART}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime < _STALE_SECONDS:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
