"""An adapter that comes as a zip file, unpacked without trusting anything that the archive says."""

from __future__ import annotations

import io
import stat
import unicodedata
import zipfile
import zlib
from pathlib import Path

from resonance.messages import _
from resonance.serve.faults import ServiceError
from resonance.serve.store import KEPT_ENDINGS
from resonance.serve.uploads import shown_name

PIECE_BYTES = 1 << 20
MAX_RATIO = 200  # unpacked to packed: JSON reaches 20, weights 1.1; zeros, which are a bomb, 1000
RATIO_FROM_BYTES = 1 << 20
LIST_BYTES = 1 << 17  # of the archive's list of files: an adapter's has 2 kB
MAX_DEPTH = 4
MAX_NAME_BYTES = 200


def unpack(data: bytes, into: Path, max_bytes: int, max_files: int = 64) -> None:
    """Write the files of an adapter's zip archive to the folder `into`, which is there and empty.

    A single folder around everything is left out, and the one in it; a file in any other is refused, for it would not be
    kept. Sizes are counted while unpacking, whatever the archive claims. Raises ServiceError 400 archive_unreadable, 413
    archive_too_large or 422 archive_refused; what was written until then is the caller's to remove.
    """
    try:
        file = _Guarded(data)
        with zipfile.ZipFile(file) as archive:
            file.longest_read = None
            members = [member for member in archive.infolist() if not _unasked(member)]
            if len(members) > max_files:
                raise ServiceError(
                    413,
                    "archive_too_large",
                    _("The archive has more than {most} files.").format(most=max_files),
                    _("Send only the files of the adapter folder."),
                    param="file",
                )
            names = _names(members)
            left = max_bytes
            for member, name in zip(members, names, strict=True):
                left -= _write(archive, member, into / name, left, max_bytes)
    except ServiceError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # of our disk
            raise
        raise ServiceError(
            400,
            "archive_unreadable",
            _("The archive cannot be read ({reason}).").format(reason=shown_name(str(error))),
            _("Send the adapter folder as a zip file."),
            param="file",
        ) from None


class _Guarded(io.BytesIO):
    """While zipfile opens it: it reads the whole list of files at once, and makes an object of 600 bytes of 46."""

    longest_read: int | None = LIST_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        if self.longest_read is not None and len(content) > self.longest_read:
            raise zipfile.BadZipFile(_("its list of files is too long"))
        return content


def _unasked(member: zipfile.ZipInfo) -> bool:
    """Whether it is a folder, or one of the files that systems add to every folder."""
    parts = member.filename.split("/")
    if len(parts) > 1 and not parts[-1]:  # is_dir() of Python 3.11 raises IndexError for a file without a name
        return True
    return parts[0] == "__MACOSX" or parts[-1] in (".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes")


def _names(members: list[zipfile.ZipInfo]) -> list[str]:
    """What each file is called in the target folder, checked. An adapter has no folders in it: PEFT writes them where it saves
    several adapters at once."""
    paths = [_parts(member) for member in members]
    if not paths:
        raise _refused(_("it has no files"))
    while len({path[0] for path in paths}) == 1 and all(len(path) > 1 for path in paths):
        paths = [path[1:] for path in paths]
    seen: set[str] = set()
    for member, path in zip(members, paths, strict=True):
        if len(path) > 1:
            raise _refused(_("{name} lies in a folder inside").format(name=shown_name(path[-1], "?")))
        # Two names that are one on a disk that ignores case or composes characters.
        key = unicodedata.normalize("NFC", path[0]).casefold()
        if key in seen:
            raise _refused(_("two files are named {name}").format(name=shown_name(member.filename, "?")))
        seen.add(key)
    return [path[0] for path in paths]


def _parts(member: zipfile.ZipInfo) -> tuple[str, ...]:
    # orig_filename: zipfile cuts the other one off at a null character.
    name = member.orig_filename
    shown = shown_name(name, "?")
    parts = tuple(name.split("/"))
    wrong = (
        "\\" in name
        or ":" in name
        or not all(parts)  # begins with a slash, or has two
        or any(
            part in (".", "..") or part.startswith(".") or part != part.strip() or part.endswith(".") for part in parts
        )
        or any(unicodedata.category(character)[0] == "C" for character in name)
        or len(name.encode(errors="replace")) > MAX_NAME_BYTES
        or len(parts) > MAX_DEPTH
    )
    if wrong:
        raise _refused(_("the name {name} is not one of an adapter's files").format(name=shown))
    if member.flag_bits & 0x1:
        raise _refused(_("{name} is encrypted").format(name=shown))
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise _refused(_("{name} is not a plain file").format(name=shown))
    if Path(parts[-1]).suffix not in KEPT_ENDINGS:
        raise _refused(_("{name} is of a kind that adapters do not have").format(name=shown))
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _refused(_("{name} is compressed in an unusual way").format(name=shown))
    return parts


def _write(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, left: int, max_bytes: int) -> int:
    """Unpack one file of at most `left` bytes and return how many it has."""
    written = 0
    most = min(left, max(RATIO_FROM_BYTES, MAX_RATIO * member.compress_size))
    with archive.open(member) as source, path.open("xb") as target:
        while piece := source.read(PIECE_BYTES):
            written += len(piece)
            if written > most:
                raise ServiceError(
                    413,
                    "archive_too_large",
                    _("The archive is larger than {limit:g} MB when it is unpacked.").format(limit=max_bytes / 1e6)
                    if written > left
                    else _("The archive unpacks to far more than an adapter's files do."),
                    _("Send only the files of the adapter folder."),
                    param="file",
                )
            target.write(piece)
    return written


def _refused(reason: str) -> ServiceError:
    return ServiceError(
        422,
        "archive_refused",
        _("The archive is not an adapter: {reason}.").format(reason=reason),
        _("Send the adapter folder as it was written by the training, as a zip file, without checkpoints."),
        param="file",
    )
