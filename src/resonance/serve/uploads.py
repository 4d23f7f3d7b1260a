"""What a client sends, read into memory with every limit enforced while it arrives. Nothing is written to disk."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from resonance.messages import _
from resonance.serve.faults import ServiceError
from resonance.serve.speech import Upload

# It logs each malformed form, and a client may send as many as it likes.
logging.getLogger("python_multipart").setLevel(logging.ERROR)

FIELD_BYTES = 1 << 16  # of one field: a list of phrases; and of all that is not the file, ten times that
FIELDS = 64
NAME_CHARACTERS = 100
LISTED_NAMES = 5


@dataclass
class ReadingBudget:
    """Bytes that all requests together may hold while they are being read; several of one account, half of them."""

    max_bytes: int = 1 << 30
    held: int = field(default=0, init=False)
    _by_account: Counter[str] = field(default_factory=Counter, init=False)

    @contextlib.contextmanager
    def reading(self, account: str) -> Iterator[Callable[[int], None]]:
        """A function that is told of each piece that arrives. Raises ServiceError 503 when memory is used up."""
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            own = self._by_account[account]
            # A single one may be as large as any.
            greedy = own > mine and own + size > self.max_bytes // 2
            if greedy or self.held + size > self.max_bytes:
                raise ServiceError(
                    503,
                    "too_many_uploads",
                    _("More recordings are being sent than the service takes at once."),
                    _("Send it again after the seconds that Retry-After gives."),
                    retry_after=5,
                )
            mine += size
            self.held += size
            self._by_account[account] += size

        try:
            yield take
        finally:
            self.held -= mine
            self._by_account[account] -= mine
            if not self._by_account[account]:
                del self._by_account[account]


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of a form in the order of their values, and the one file."""

    fields: dict[str, list[str]]
    file: Upload | None


async def read_form(
    request: Request,
    *,
    max_file_bytes: int,
    deadline: float,
    file_field: str = "file",
    file_needed: bool = True,
    budget: ReadingBudget | None = None,
    idle_seconds: float = math.inf,
) -> Form:
    """The form of a request. `deadline` is on the clock of time.monotonic().

    A part named `file_field` is the file, also where a client gives it no file name. Raises ServiceError: 400 bad_form,
    missing_file, several_files, file_empty or too_many_fields, 408 upload_too_slow, 413 upload_too_large or
    field_too_large, 415 not_a_form, 503 too_many_uploads; starlette's ClientDisconnect when the client goes away.
    """
    given = request.headers.get("content-type", "")
    kind, options = parse_options_header(given)
    match kind:
        case b"multipart/form-data":
            parts = _Parts(file_field, max_file_bytes)
            parser = _parser(parts, options.get(b"boundary", b""))
            limit = max_file_bytes + 10 * FIELD_BYTES
            async with aclosing(_pieces(request, limit, max_file_bytes, deadline, idle_seconds, budget)) as pieces:
                async for piece in pieces:
                    try:
                        parser.write(piece)
                    except FormParserError as error:
                        raise _bad_form(str(error)) from None
            if not parts.ended:
                raise _bad_form(_("it ends before its last boundary"))
            fields, found = parts.fields, parts.file
        case b"application/x-www-form-urlencoded":
            body = await _whole(request, 10 * FIELD_BYTES, deadline, idle_seconds, budget)
            fields, found = _plain_fields(body), None
        case _:
            raise ServiceError(
                415,
                "not_a_form",
                _("The request is not a form: its Content-Type is {found}.").format(
                    found=shown_name(given) if given else _("missing")
                ),
                _("Send multipart/form-data with the file in the field “{field}”.").format(field=file_field),
            )
    if found is None and file_needed:
        raise _missing_file(file_field, fields)
    if found is not None and not found.data:
        raise ServiceError(
            400,
            "file_empty",
            _("{path}: the file is empty (0 bytes).").format(path=found.name),
            _("Record it again and send the file that results."),
            param=file_field,
        )
    return Form(fields, found)


async def read_body(
    request: Request,
    *,
    max_bytes: int,
    deadline: float,
    budget: ReadingBudget | None = None,
    idle_seconds: float = math.inf,
) -> bytes:
    """The body as it is, such as an archive. Raises ServiceError: 400 body_empty, 408 upload_too_slow,
    413 upload_too_large, 503 too_many_uploads."""
    content = await _whole(request, max_bytes, deadline, idle_seconds, budget)
    if not content:
        raise ServiceError(
            400,
            "body_empty",
            _("The request has no body."),
            _("Send the content of the file as the body of the request."),
        )
    return content


def shown_name(name: str, otherwise: str = "") -> str:
    """The last part of a name that a client gave, fit for messages and logs: short, on one line, no hidden characters."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    seen = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") else c for c in last)
    return " ".join(seen.split())[:NAME_CHARACTERS].strip() or otherwise


def upload_too_large(name: str, limit: int) -> ServiceError:
    return ServiceError(
        413,
        "upload_too_large",
        _("{path}: larger than {limit:g} MB.").format(path=name, limit=limit / 1e6),
        _("Send a compressed format (MP3, M4A, OGG) or a shorter recording."),
        param="file",
    )


async def _whole(
    request: Request, max_bytes: int, deadline: float, idle_seconds: float, budget: ReadingBudget | None
) -> bytes:
    async with aclosing(_pieces(request, max_bytes, max_bytes, deadline, idle_seconds, budget)) as pieces:
        return b"".join([piece async for piece in pieces])


async def _pieces(
    request: Request, max_bytes: int, told: int, deadline: float, idle_seconds: float, budget: ReadingBudget | None
) -> AsyncGenerator[bytes, None]:
    """The body as it arrives. `told` is the limit that the message names."""
    stated = request.headers.get("content-length", "")
    if stated.isascii() and stated.isdigit() and int(stated[:20]) > max_bytes:
        raise upload_too_large(_("The upload"), told)
    total = 0
    stream = request.stream()
    with (budget or ReadingBudget()).reading(getattr(request.state, "account", "")) as take:
        while True:
            allowed = min(idle_seconds, deadline - time.monotonic())
            try:
                piece = await asyncio.wait_for(anext(stream, None), allowed)
            except TimeoutError:
                raise ServiceError(
                    408,
                    "upload_too_slow",
                    _("The upload stopped or was too slow."),
                    _("Send it again over a better connection, or a compressed format (MP3, M4A, OGG)."),
                ) from None
            if piece is None:
                return
            total += len(piece)
            if total > max_bytes:
                raise upload_too_large(_("The upload"), told)
            take(len(piece))
            yield piece


class _Parts:
    """The parts of a multipart body, as python-multipart finds them."""

    def __init__(self, file_field: str, max_file_bytes: int) -> None:
        self.fields: dict[str, list[str]] = {}
        self.file: Upload | None = None
        self.ended = False
        self._file_field, self._max_file_bytes = file_field, max_file_bytes
        self._count = self._field_bytes = 0
        self._header = self._value = b""
        self._disposition = b""
        self._name, self._file_name = "", ""
        self._content = bytearray()
        self._is_file = False

    def begin(self) -> None:
        self._count += 1
        if self._count > FIELDS:
            raise ServiceError(
                400,
                "too_many_fields",
                _("The form has more than {most} fields.").format(most=FIELDS),
                _("Send only the fields that the documentation names."),
            )
        self._disposition = b""
        self._content = bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def headers_finished(self) -> None:
        _kind, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise _bad_form(_("a part has no name"))
        self._name = options[b"name"].decode(errors="replace")
        self._is_file = b"filename" in options or self._name == self._file_field
        self._file_name = options.get(b"filename", b"").decode(errors="replace")

    def data(self, data: bytes, start: int, end: int) -> None:
        size = end - start
        if self._is_file:
            if len(self._content) + size > self._max_file_bytes:
                raise upload_too_large(shown_name(self._file_name, _("The upload")), self._max_file_bytes)
        else:
            self._field_bytes += size
            if len(self._content) + size > FIELD_BYTES or self._field_bytes > 10 * FIELD_BYTES:
                raise _field_too_large(self._name)
        self._content += data[start:end]

    def end(self) -> None:
        if not self._is_file:
            try:
                self.fields.setdefault(self._name, []).append(self._content.decode())
            except UnicodeDecodeError:
                raise _not_utf8(self._name) from None
            return
        if not self._content and not self._file_name:  # a web form in which no file was chosen
            return
        if self._name != self._file_field:
            raise _missing_file(self._file_field, {self._name: []})
        if self.file is not None:
            raise ServiceError(
                400,
                "several_files",
                _("The form has several files."),
                _("Send one request for each file."),
                param=self._file_field,
            )
        self.file = Upload(bytes(self._content), shown_name(self._file_name, self._file_field))

    def finish(self) -> None:
        self.ended = True


def _parser(parts: _Parts, boundary: bytes) -> MultipartParser:
    if not boundary:
        raise _bad_form(_("its Content-Type names no boundary"))
    try:
        return MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_part_data": parts.data,
                "on_part_end": parts.end,
                "on_header_field": parts.header_field,
                "on_header_value": parts.header_value,
                "on_header_end": parts.header_end,
                "on_headers_finished": parts.headers_finished,
                "on_end": parts.finish,
            },
        )
    except FormParserError as error:
        raise _bad_form(str(error)) from None


def _plain_fields(body: bytes) -> dict[str, list[str]]:
    try:
        pairs = urllib.parse.parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=FIELDS
        )
    except ValueError as error:
        raise _bad_form(str(error)) from None
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        if len(value) > FIELD_BYTES:
            raise _field_too_large(name)
        fields.setdefault(name, []).append(value)
    return fields


def _missing_file(file_field: str, fields: dict[str, list[str]]) -> ServiceError:
    names = [shown_name(name, "?") for name in list(fields)[:LISTED_NAMES]]
    found = _("found: {names}").format(names=", ".join(names)) if names else _("the form is empty")
    return ServiceError(
        400,
        "missing_file",
        _("There is no file in the field “{field}” ({found}).").format(field=file_field, found=found),
        _("Send the file as multipart/form-data in the field “{field}”.").format(field=file_field),
        param=file_field,
    )


def _field_too_large(name: str) -> ServiceError:
    return ServiceError(
        413,
        "field_too_large",
        _("The field “{field}” is too long.").format(field=shown_name(name, "?")),
        _("Send at most {most} bytes in it.").format(most=FIELD_BYTES),
        param=shown_name(name, "?"),
    )


def _not_utf8(name: str) -> ServiceError:
    return ServiceError(
        400,
        "bad_form",
        _("The field “{field}” is not text in UTF-8.").format(field=shown_name(name, "?")),
        _("Send text as UTF-8."),
        param=shown_name(name, "?"),
    )


def _bad_form(reason: str) -> ServiceError:
    return ServiceError(
        400,
        "bad_form",
        _("The form cannot be read: {reason}.").format(reason=reason.rstrip(".")),
        _("Let a library write the form, such as curl -F file=@recording.wav."),
    )
