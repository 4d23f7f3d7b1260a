"""Tar files of recordings in WebDataset's layout: `KEY.flac` beside `KEY.json` or `KEY.txt`, one key after the other.

Read member by member, never extracted: a name such as `../../x` is only a name. Python's own iteration over a tar file ends
without a word where it is damaged; here that is an error.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

from resonance.data.addresses import open_place
from resonance.data.convert import MEDIA_SUFFIX
from resonance.data.samples import Sample, embedded_reader
from resonance.errors import ShardError
from resonance.messages import _

TEXT_SUFFIXES = (".txt", ".transcript", ".lab", ".cls")
MAX_MEMBER_BYTES = 256 << 20  # a clip of 30 s has 23 MB at most (192 kHz, 32 bits); a forged size must not fill memory


class Member(NamedTuple):
    key: str
    suffix: str
    read: Callable[[], bytes]


def read_tar(place: str, unit: int, numbers: range) -> Iterator[Sample]:
    """The samples of the tar file at `place` whose place in it is in `numbers`."""
    make = embedded_reader(unit)
    if not numbers:
        return
    last = numbers[-1]
    with open_place(place) as stream:
        key, number, parts = "", -1, dict[str, bytes]()
        for member in _members(place, stream):
            if member.key != key:
                if number in numbers:
                    yield _sample(make, place, key, parts, number)
                if number >= last:
                    return
                key, number, parts = member.key, number + 1, {}
            if number in numbers and member.suffix not in parts:
                parts[member.suffix] = member.read()
        if number in numbers:
            yield _sample(make, place, key, parts, number)


def count_tar(place: str) -> int:
    """Samples in the tar file at `place`, by its headers. Raises ShardError where it is damaged or cut off."""
    with open_place(place) as stream:
        count, key = 0, ""
        for member in _members(place, stream):
            count, key = count + (member.key != key), member.key
    return count


def _members(place: str, stream: BinaryIO) -> Iterator[Member]:
    """The recordings and texts in a tar file; what else lies in it is passed over."""
    try:
        archive = tarfile.TarFile(fileobj=stream, mode="r")
    except tarfile.TarError as error:
        raise _damaged(place, 0, _("not an uncompressed tar file: {reason}").format(reason=error)) from error
    end = stream.seek(0, 2)
    archive.offset = position = 0
    while True:
        stream.seek(position)
        if not (head := stream.read(tarfile.BLOCKSIZE)).strip(b"\0"):
            if len(head) < tarfile.BLOCKSIZE:
                raise _damaged(place, position, _("the end is missing"))
            return  # a block of zeros is the proper end
        stream.seek(position)
        try:
            found = tarfile.TarInfo.fromtarfile(archive)
        except (tarfile.HeaderError, ValueError) as error:
            raise _damaged(place, position, str(error)) from error
        position = archive.offset
        if position > end:
            raise _damaged(place, end, _("the end is missing"))
        folder, slash, name = found.name.rpartition("/")
        stem, _dot, endings = name.partition(".")
        suffix = f".{endings.rpartition('.')[2].lower()}"
        known = suffix in (".json", *TEXT_SUFFIXES) or MEDIA_SUFFIX.fullmatch(suffix)
        if found.isreg() and not found.issparse() and stem and known:
            yield Member(folder + slash + stem, suffix, lambda found=found: _content(place, stream, found))  # type: ignore[misc]


def _content(place: str, stream: BinaryIO, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_MEMBER_BYTES:
        raise _damaged(place, member.offset, _("{name} claims {size} bytes").format(name=member.name, size=member.size))
    stream.seek(member.offset_data)
    data = stream.read(member.size)
    if len(data) < member.size:
        raise _damaged(place, member.offset, _("the end is missing"))
    return data


def _sample(
    make: Callable[[Mapping[str, object], bytes | None, str, int], Sample],
    place: str,
    key: str,
    parts: Mapping[str, bytes],
    number: int,
) -> Sample:
    name = f"{place}/{key}"
    audio = next((suffix for suffix in parts if MEDIA_SUFFIX.fullmatch(suffix)), None)
    try:
        row = json.loads(parts[".json"]) if ".json" in parts else {}
        row = row if isinstance(row, dict) else {"text": row}  # some write the text alone, in quotes
        text = next((parts[suffix].decode("utf-8-sig") for suffix in TEXT_SUFFIXES if suffix in parts), None)
    except ValueError as error:
        return make({}, None, name, number)._replace(
            fault=_("{name}: its text is not UTF-8 or not JSON ({reason}).").format(name=name, reason=error)
        )
    sample = make(
        row if text is None else {"text": text, **row}, parts[audio] if audio else None, f"{name}{audio or ''}", number
    )
    if audio is None:
        return sample._replace(fault=_("{name}: no recording beside this text.").format(name=name))
    return sample


def _damaged(place: str, position: int, reason: str) -> ShardError:
    return ShardError(
        _(
            "{place}: damaged or cut off at byte {position} ({reason}). Copy or write it again, or leave such parts out "
            "with --skip_broken."
        ).format(place=place, position=position, reason=reason)
    )
