"""Text files in and out: UTF-8 or an error that names the encoding, and writing that never leaves half a file."""

from __future__ import annotations

import contextlib
import itertools
import os
import shlex
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from resonance.errors import DataError, ManifestError
from resonance.messages import _

_BOMS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


def read_text(path: Path) -> str:
    """The whole file as text, without a byte order mark, with `\\n` at line ends (`\\r\\n` is left to the caller).

    Raises ManifestError when the file cannot be opened, is no text, or is in another encoding than UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ManifestError(
            _("{path}: cannot be read ({reason}).").format(path=path, reason=error.strerror or error)
        ) from error
    if data.startswith(b"PK\x03\x04"):
        raise ManifestError(
            _(
                "{path}: this is a ZIP archive or an Excel workbook, not a text file. "
                "Unpack the archive, or save the table as “CSV UTF-8”, and give that file."
            ).format(path=path)
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _wrong_encoding(path, data) from None
    if "\x00" in text:
        raise _wrong_encoding(path, data)
    if "\r" in text and "\n" not in text:
        text = text.replace("\r", "\n")
    return text


def refuse_wrong_encoding(place: str, data: bytes) -> None:
    """Raise ManifestError when `data`, a part of the file at `place`, is not UTF-8."""
    try:
        if b"\x00" not in data:
            data.decode("utf-8-sig")
            return
    except UnicodeDecodeError:
        pass
    raise _wrong_encoding(Path(place), data)


def lines(text: str) -> Iterator[str]:
    """The lines of `text`, each with its `\\n`. Unlike str.splitlines, U+2028 and form feeds inside a text stay in it."""
    start = 0
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def write_text_atomic(path: Path, parts: Iterable[str], *, bom: bool = False, mode: int = 0o666) -> None:
    """Write `parts` one after the other to `path` (UTF-8), which appears complete or not at all, with permissions `mode`.

    Raises DataError with the reason (no permission, disk full) and leaves an existing file as it was.
    """
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoding = "utf-8-sig" if bom else "utf-8"
        with open(temporary, "w", encoding=encoding, newline="", opener=partial(os.open, mode=mode)) as stream:
            stream.writelines(parts)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise DataError(
            _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                path=path, reason=error.strerror or error
            )
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _wrong_encoding(path: Path, data: bytes) -> ManifestError:
    encoding, line = _guess_encoding(data)
    if encoding is None:
        return ManifestError(
            _(
                "{path}: this is not a text file. Give the file that lists the recordings and what is said in them."
            ).format(path=path)
        )
    if encoding == "UTF-8":
        return ManifestError(
            _("{path}: damaged in line {line}: its bytes there are not UTF-8. Retype that line and save again.").format(
                path=path, line=line
            )
        )
    quoted = shlex.quote(str(path))
    target = shlex.quote(str(path.with_name(f"{path.stem}.utf8{path.suffix}")))
    return ManifestError(
        _(
            "{path}: not saved as UTF-8 but, it seems, as {encoding}. Open it in an editor and save it with the encoding "
            "UTF-8, or run: iconv -f {encoding} -t UTF-8 {quoted} > {target}"
        ).format(path=path, encoding=encoding, quoted=quoted, target=target)
    )


def _guess_encoding(data: bytes) -> tuple[str | None, int]:
    """The likely encoding of bytes that are not UTF-8 (None: no text at all), and the first line that is not UTF-8."""
    for mark, name in _BOMS:
        if data.startswith(mark):
            return name, 1
    head = data[:4000]
    if b"\x00" in data:
        # ASCII characters in UTF-16 without a mark have a zero byte each, on one side of the pair only.
        odd, even = head[1::2].count(0), head[::2].count(0)
        if max(odd, even) > len(head) // 8 and min(odd, even) < max(odd, even) // 8:
            return ("UTF-16LE" if odd > even else "UTF-16BE"), 1
        return None, 0
    if sum(byte < 32 and byte not in b"\t\n\r\f\v\x1b" for byte in head) > len(head) // 50:
        return None, 0
    decoded = data.decode("utf-8", errors="replace")
    damaged = decoded.count("\ufffd")
    if damaged * 20 < len(decoded) - len(decoded.encode("ascii", errors="ignore")):
        return "UTF-8", decoded[: decoded.index("\ufffd")].count("\n") + 1
    if _decodes(data, "gb2312"):
        return "GBK", 1
    if _decodes(data, "big5hkscs") and _looks_like_big5(data):
        return "BIG5", 1
    if _decodes(data, "gb18030") and not _mostly_ascii(data):
        return "GB18030", 1
    return "CP1252", 1


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _looks_like_big5(data: bytes) -> bool:
    """Whether nearly all two-byte characters lie in Big5's first plane of common characters (lead bytes A1-C6)."""
    leads = [pair[0] for pair in (char.encode("big5hkscs") for char in data.decode("big5hkscs")) if len(pair) == 2]
    return bool(leads) and sum(lead <= 0xC6 for lead in leads) > 0.8 * len(leads)


def _mostly_ascii(data: bytes) -> bool:
    """Accented Latin letters stand alone between ASCII letters; Chinese characters come in runs of high bytes."""
    high = [byte >= 0x80 for byte in data]
    neighbours = sum(left and right for left, right in itertools.pairwise(high))
    return neighbours < sum(high) // 2
