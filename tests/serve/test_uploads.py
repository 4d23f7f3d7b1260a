"""Forms and bodies are read into memory as they arrive, and no further than the limits."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect, Request

from resonance.serve import uploads
from resonance.serve.faults import ServiceError
from resonance.serve.uploads import Form, ReadingBudget, read_body, read_form, shown_name

BOUNDARY = "----limit"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
LIMIT = 1_000_000


def part(name: str | None, content: bytes, file_name: str | None = None) -> bytes:
    names = [f'name="{name}"'] if name is not None else []
    names += [f'filename="{file_name}"'] if file_name is not None else []
    head = f"--{BOUNDARY}\r\nContent-Disposition: {'; '.join(['form-data', *names])}\r\n\r\n"
    return head.encode() + content + b"\r\n"


def form(*parts: bytes, end: bytes = f"--{BOUNDARY}--\r\n".encode()) -> bytes:
    return b"".join(parts) + end


def request(
    body: bytes | Iterable[bytes],
    content_type: str | None = MULTIPART,
    length: str | None = None,
    pause: float = 0,
    vanish: bool = False,
) -> Request:
    """A request as a server hands it over, its body in pieces."""
    pieces = iter([body] if isinstance(body, bytes) else body)

    async def receive() -> dict[str, Any]:
        if pause:
            await asyncio.sleep(pause)
        piece = next(pieces, None)
        if piece is None and vanish:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    headers = [(b"content-type", content_type.encode("latin-1"))] if content_type is not None else []
    headers += [(b"content-length", length.encode())] if length is not None else []
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


def read(asked: Request, **changes: Any) -> Form:
    usual: dict[str, Any] = {"max_file_bytes": LIMIT, "deadline": time.monotonic() + 20}
    return asyncio.run(read_form(asked, **{**usual, **changes}))


def refusal(asked: Request, **changes: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        read(asked, **changes)
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("step", [1, 7, 4096, LIMIT])
def test_a_form_is_the_same_in_whatever_pieces_it_arrives(step: int) -> None:
    sound = bytes(range(256)) * 8 + b"\r\n--" + BOUNDARY.encode()[:-1]
    body = form(
        part("language", b"zh"),
        part("file", sound, "visit.wav"),
        part("phrases", "开门\n喝水".encode()),
        part("timestamp_granularities[]", b"word"),
        part("timestamp_granularities[]", b"segment"),
    )
    found = read(request(body[i : i + step] for i in range(0, len(body), step)))
    assert found.file and (found.file.data, found.file.name) == (sound, "visit.wav")
    assert found.fields == {
        "language": ["zh"],
        "phrases": ["开门\n喝水"],
        "timestamp_granularities[]": ["word", "segment"],
    }


def test_a_large_file_never_touches_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise AssertionError("a temporary file was asked for")

    for name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, refuse)
    sound = bytes(5_000_000)
    body = form(part("file", sound, "a.wav"))
    pieces = (body[i : i + 65_536] for i in range(0, len(body), 65_536))
    found = read(request(pieces), max_file_bytes=5_000_000)
    assert found.file and len(found.file.data) == 5_000_000


def test_a_file_without_a_file_name_is_taken_all_the_same() -> None:
    found = read(request(form(part("file", b"sound"))))
    assert found.file and (found.file.data, found.file.name) == (b"sound", "file")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (form(part("audio", b"sound", "a.wav"), part("language", b"en")), "found: audio"),
        (form(part("language", b"en"), part("task", b"transcribe")), "found: language, task"),
        (form(part("file", b"", "")), "the form is empty"),
        (form(*(part(f"f{i}", b"") for i in range(9))), "found: f0, f1, f2, f3, f4)"),
        (form(part("x" * 500, b"", "a.wav")), "x" * 100 + ")"),
        (form(part("a\u202eb", b"", "a.wav")), "found: a b"),
    ],
    ids=["other name", "no file", "none chosen", "many fields", "long name", "hidden character"],
)
def test_a_form_without_the_file_is_told_what_it_has_instead(body: bytes, words: str) -> None:
    fault = refusal(request(body))
    assert (fault.status, fault.code, fault.param) == (400, "missing_file", "file")
    assert words in fault.message


def test_a_form_may_do_without_a_file_where_none_is_needed() -> None:
    assert read(request(form(part("version", b"3"))), file_needed=False) == Form({"version": ["3"]}, None)
    plain = request(b"version=3&version=4&a=%E5%BC%80", "application/x-www-form-urlencoded")
    assert read(plain, file_needed=False) == Form({"version": ["3", "4"], "a": ["开"]}, None)


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        (request(form(part("file", b"", "a.wav"))), 400, "file_empty"),
        (request(form(part("file", b"1", "a.wav"), part("file", b"2", "b.wav"))), 400, "several_files"),
        (request(form(part("file", b"1", "a.wav"), end=b"")), 400, "bad_form"),
        (request(b""), 400, "bad_form"),
        (request(b"RIFF\x24\x00WAVE"), 400, "bad_form"),
        (request(form(part("file", b"1")), MULTIPART.replace(BOUNDARY, "other")), 400, "bad_form"),
        (request(form(part("file", b"1")), "multipart/form-data"), 400, "bad_form"),
        (request(form(part("file", b"1")), f"multipart/form-data; boundary={'x' * 3000}"), 400, "bad_form"),
        (request(form(part(None, b"1"))), 400, "bad_form"),
        (request(form(part("language", b"\xff\xfe"), part("file", b"1"))), 400, "bad_form"),
        (request(b"a=%FF", "application/x-www-form-urlencoded"), 400, "bad_form"),
        (request(b"a=\xff", "application/x-www-form-urlencoded"), 400, "bad_form"),
        (request(b"&a" * 100, "application/x-www-form-urlencoded"), 400, "bad_form"),
        (request(form(*(part("a", b"") for _ in range(65)))), 400, "too_many_fields"),
        (request(form(part("a", bytes(65_537)))), 413, "field_too_large"),
        (request(form(*(part(f"f{i}", b"x" * 60_000) for i in range(20)))), 413, "field_too_large"),
        (request(b"a=" + b"x" * 70_000, "application/x-www-form-urlencoded"), 413, "field_too_large"),
        (request(b"a=" + b"x" * 700_000, "application/x-www-form-urlencoded"), 413, "upload_too_large"),
        (request(b"sound", None), 415, "not_a_form"),
        (request(b"sound", "audio/wav"), 415, "not_a_form"),
        (request(b"{}", "application/json"), 415, "not_a_form"),
        (request(b"sound", "\xe9\r\n"), 415, "not_a_form"),
    ],
)
def test_each_fault_has_its_status_and_code(asked: Request, status: int, code: str) -> None:
    fault = refusal(asked)
    assert (fault.status, fault.code) == (status, code)
    assert fault.message.isprintable()


def test_a_file_of_exactly_the_limit_is_taken_and_one_byte_more_is_not() -> None:
    found = read(request(form(part("file", bytes(LIMIT), "a.wav"))))
    assert found.file and len(found.file.data) == LIMIT
    fault = refusal(request(form(part("file", bytes(LIMIT + 1), "a.wav"))))
    assert (fault.status, fault.code) == (413, "upload_too_large")
    assert fault.message == "a.wav: larger than 1 MB."


@pytest.mark.parametrize("length", [None, "10", "nonsense", "-5", "9" * 5000])
def test_reading_ends_at_the_limit_whatever_the_length_that_is_claimed(length: str | None) -> None:
    sent = 0

    def endless() -> Iterable[bytes]:
        nonlocal sent
        yield part("file", b"", "a.wav")[:-2]
        while True:
            sent += 65_536
            yield bytes(65_536)

    assert refusal(request(endless(), length=length)).code == "upload_too_large"
    assert sent < LIMIT + 200_000


def test_what_states_to_be_too_large_is_not_read_at_all() -> None:
    def nothing() -> Iterable[bytes]:
        raise AssertionError("the body was read")
        yield b""

    assert refusal(request(nothing(), length="2000000000")).code == "upload_too_large"


def test_headers_of_a_part_do_not_fill_memory() -> None:
    def endless() -> Iterable[bytes]:
        yield f"--{BOUNDARY}\r\nX: ".encode()
        while True:
            yield b"x" * 65_536

    assert refusal(request(endless())).code in ("bad_form", "upload_too_large")


def test_a_slow_client_is_given_up() -> None:
    body = form(part("file", b"1", "a.wav"))
    stalls = refusal(request(body, pause=0.3), idle_seconds=0.05)
    assert (stalls.status, stalls.code) == (408, "upload_too_slow")
    begun = time.monotonic()
    trickles = refusal(request((body[i : i + 1] for i in range(len(body))), pause=0.05), deadline=begun + 0.2)
    assert (trickles.status, trickles.code) == (408, "upload_too_slow")
    assert time.monotonic() - begun < 5


def test_a_client_that_goes_away_ends_the_reading() -> None:
    budget = ReadingBudget()
    with pytest.raises(ClientDisconnect):
        read(request([part("file", b"1" * 1000)], vanish=True), budget=budget)
    assert budget.held == 0


def test_all_requests_together_hold_no_more_than_the_budget() -> None:
    budget = ReadingBudget(max_bytes=100_000)
    body = form(part("file", bytes(60_000), "a.wav"))

    async def both() -> list[Any]:
        def pieces() -> Iterable[bytes]:
            return (body[i : i + 5_000] for i in range(0, len(body), 5_000))

        asked = [request(pieces(), pause=0.001) for _ in range(2)]
        reading = (read_form(one, max_file_bytes=LIMIT, deadline=time.monotonic() + 20, budget=budget) for one in asked)
        return await asyncio.gather(*reading, return_exceptions=True)

    refused, taken = sorted(asyncio.run(both()), key=lambda found: isinstance(found, Form))
    assert isinstance(taken, Form)
    assert (refused.status, refused.code, refused.retry_after) == (503, "too_many_uploads", 5)
    assert budget.held == 0


def test_several_uploads_of_one_account_leave_half_of_the_budget_to_others() -> None:
    budget = ReadingBudget(max_bytes=100)
    with contextlib.ExitStack() as held:
        alone = held.enter_context(budget.reading("ann"))
        alone(30)
        more = held.enter_context(budget.reading("ann"))
        more(20)
        with pytest.raises(ServiceError) as caught:
            more(1)
        assert caught.value.code == "too_many_uploads"
        held.enter_context(budget.reading("bo"))(50)
    assert budget.held == 0
    with budget.reading("ann") as alone:
        alone(60)
        alone(40)


def test_a_body_is_read_as_it_is_within_its_limit() -> None:
    async def body(asked: Request) -> bytes:
        return await read_body(asked, max_bytes=1000, deadline=time.monotonic() + 20)

    assert asyncio.run(body(request([b"a" * 500, b"b" * 500], "application/zip"))) == b"a" * 500 + b"b" * 500
    for sent, code in (([b""], "body_empty"), ([b"a" * 500, b"b" * 501], "upload_too_large")):
        with pytest.raises(ServiceError) as caught:
            asyncio.run(body(request(sent, "application/zip")))
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("C:\\Users\\Anna\\visit.wav", "visit.wav"),
        ("../../etc/passwd", "passwd"),
        ("a\r\nSet-Cookie: x", "a Set-Cookie: x"),
        ("\u202egnp.wav", "gnp.wav"),
        ("  录音  1.m4a ", "录音 1.m4a"),
        ("x" * 5000, "x" * 100),
        ("\0", "recording"),
        ("", "recording"),
    ],
)
def test_names_of_files_are_fit_for_messages(given: str, shown: str) -> None:
    assert shown_name(given, "recording") == shown


@settings(max_examples=200, deadline=None)
@given(name=st.text(max_size=300))
def test_no_name_breaks_a_line_or_hides(name: str) -> None:
    shown = shown_name(name, "recording")
    assert shown and len(shown) <= uploads.NAME_CHARACTERS
    assert all(c.isprintable() or c == " " for c in shown)
    assert "/" not in shown and "\\" not in shown


@settings(max_examples=150, deadline=None)
@given(
    body=st.one_of(
        st.binary(max_size=400),
        st.lists(
            st.one_of(
                st.just(part("file", b"sound", "a.wav")),
                st.just(part("a", b"b")),
                st.just(f"--{BOUNDARY}\r\n".encode()),
                st.just(f"--{BOUNDARY}--\r\n".encode()),
                st.just(b"Content-Disposition: form-data; name*=utf-8''%FF\r\n\r\n"),
                st.binary(max_size=20),
            ),
            max_size=6,
        ).map(b"".join),
    ),
    step=st.integers(1, 50),
    content_type=st.sampled_from(
        [MULTIPART, "application/x-www-form-urlencoded", "multipart/form-data; boundary=\xff"]
    ),
)
def test_any_body_is_a_form_or_is_refused(body: bytes, step: int, content_type: str) -> None:
    try:
        found = read(request((body[i : i + step] for i in range(0, len(body), step)), content_type))
    except ServiceError as fault:
        assert fault.status in (400, 413, 415)
    else:
        assert found.file
