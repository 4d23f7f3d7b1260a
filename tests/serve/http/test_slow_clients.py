"""Clients that are silent, slow or too many: what they hold is bounded, and nobody else notices."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from resonance.errors import ConfigError
from resonance.serve.connections import allow_files
from resonance.serve.crowd import RESERVED
from resonance.serve.speech import Answer

MOST = 4  # requests and sockets at a time
HEADER_SECONDS = 0.5
IDLE_SECONDS = 1.0
DEADLINE_SECONDS = 60.0  # on a slow machine
SHORT = 2.0  # where a test waits for a deadline
SLACK = 5.0  # of a machine that does something else
HALF = b"GET /health HTTP/1.1\r\nHost: here\r\nX-Long: "


@pytest.fixture(scope="module")
def hasty(running: Any, start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A service that waits for nobody for long, and takes few at a time."""
    patience = {
        "header_seconds": HEADER_SECONDS,
        "idle_seconds": IDLE_SECONDS,
        "deadline_seconds": DEADLINE_SECONDS,
        "max_connections": MOST,
        "drain_seconds": 1,
        "audit_log": tmp_path_factory.mktemp("hasty") / "audit",
    }
    found = start(running.config.model_copy(update=patience), running.tokens)
    for server in found.running.server.servers:
        for listens in server.sockets:  # what a client does not read soon stays with the service
            listens.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    yield found.running
    found.stop()


@pytest.fixture(autouse=True)
def nobody_is_left(hasty: Any) -> Iterator[None]:
    """Whatever a client does, nothing of it stays."""
    yield
    until(lambda: not hasty.server.server_state.tasks and not open_connections(hasty))


def open_connections(running: Any) -> int:
    return len(running.server.server_state.connections)


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends, "it never was"
        time.sleep(0.02)


def opened(running: Any, first: bytes = b"") -> socket.socket:
    place = urlsplit(running.address)
    found = socket.create_connection((place.hostname, place.port), timeout=60)
    found.sendall(first)
    return found


def rest(connection: socket.socket) -> bytes:
    """All that the service sends until it closes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            found += piece
    connection.close()
    return found


class Sent(io.BytesIO):
    def makefile(self, _mode: str) -> io.BytesIO:
        return self


def answer(data: bytes) -> tuple[int, dict[str, str], Any]:
    found = http.client.HTTPResponse(Sent(data))  # type: ignore[arg-type]
    found.begin()
    return found.status, {name.lower(): value for name, value in found.getheaders()}, json.loads(found.read())


def first(connection: socket.socket) -> tuple[int, Any]:
    """The status and the content of an answer, of a service that does not close."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _empty, content = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(content) < length:
        content += connection.recv(65536)
    return int(head.split()[1]), json.loads(content)


def post(running: Any, token: str, length: int = 100_000) -> bytes:
    """The head of an upload and the beginning of its body."""
    head = (
        f"POST /transcribe HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {running.tokens.get(token, token)}\r\n"
        f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {length}\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    )
    return head.encode()


def dropped(running: Any, why: str) -> float:
    found = running.service.metrics.registry.get_sample_value("resonance_connections_dropped_total", {"why": why})
    return found or 0.0


def drip(connection: socket.socket, seconds: float) -> None:
    """A byte now and then, until the service closes."""
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x")
            time.sleep(seconds)


def test_who_connects_and_says_nothing_is_let_go(hasty: Any) -> None:
    begun = time.monotonic()
    assert rest(opened(hasty)) == b""
    assert HEADER_SECONDS <= time.monotonic() - begun + 0.05 < HEADER_SECONDS + SLACK


@pytest.mark.parametrize("dripping", [False, True], ids=["half a head", "a head byte by byte"])
def test_half_a_request_is_answered_with_408_in_the_one_shape_and_closed(hasty: Any, dripping: bool) -> None:
    begun = time.monotonic()
    connection = opened(hasty, HALF)
    if dripping:
        threading.Thread(target=drip, args=(connection, HEADER_SECONDS / 5), daemon=True).start()
    status, headers, body = answer(rest(connection))
    assert (status, body["error"]["code"]) == (408, "request_too_slow") and headers["connection"] == "close"
    assert body["error"].keys() == {"message", "type", "param", "code", "hint"}
    assert time.monotonic() - begun < HEADER_SECONDS + SLACK


def test_a_connection_kept_for_a_next_request_is_closed_when_none_comes(hasty: Any) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n"
    begun = time.monotonic()
    connection = opened(hasty, whole)
    assert first(connection)[0] == 200
    assert rest(connection) == b"" and IDLE_SECONDS <= time.monotonic() - begun + 0.05 < IDLE_SECONDS + SLACK
    connection = opened(hasty, whole)
    assert first(connection)[0] == 200
    connection.sendall(HALF)
    assert answer(rest(connection))[0] == 408


def test_an_upload_byte_by_byte_ends_with_the_deadline(hasty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    soon = hasty.config.model_copy(update={"deadline_seconds": SHORT})
    monkeypatch.setitem(hasty.server.config.app.state._state, "config", soon)
    connection = opened(hasty, post(hasty, "all"))
    begun = time.monotonic()
    threading.Thread(target=drip, args=(connection, IDLE_SECONDS / 4), daemon=True).start()
    status, body = first(connection)
    assert (status, body["error"]["code"]) == (408, "upload_too_slow")
    assert SHORT - 0.2 < time.monotonic() - begun < SHORT + SLACK
    connection.close()


def test_who_was_refused_and_goes_on_sending_is_told_and_not_listened_to_for_ever(
    hasty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hasty.server.config.http.__self__, "body_seconds", SHORT)
    connection = opened(hasty, post(hasty, "rsn_wrong", 10_000_000))
    begun = time.monotonic()
    assert first(connection)[0] == 401
    threading.Thread(target=drip, args=(connection, IDLE_SECONDS / 4), daemon=True).start()
    rest(connection)
    assert SHORT - 0.2 < time.monotonic() - begun < SHORT + SLACK


def test_after_the_rest_of_a_body_nobody_wanted_the_connection_answers_again(hasty: Any) -> None:
    head = post(hasty, "rsn_wrong", 3000)
    connection = opened(hasty, head)
    assert first(connection)[0] == 401
    left = 3000 - len(head.partition(b"\r\n\r\n")[2])
    connection.sendall(bytes(left // 2))
    time.sleep(0.1)
    connection.sendall(bytes(left - left // 2) + b"GET /health HTTP/1.1\r\nHost: here\r\n\r\n")
    assert first(connection)[0] == 200
    connection.close()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HELO here\r\n\r\n"])
def test_what_is_not_http_is_refused_in_the_one_shape(hasty: Any, sent: bytes) -> None:
    status, headers, body = answer(rest(opened(hasty, sent + b"\r\n\r\n")))
    assert (status, body["error"]["code"]) == (400, "invalid_request") and headers["content-type"] == "application/json"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("answered", [False, True], ids=["in one packet", "behind the answer"])
def test_a_body_that_cannot_be_read_ends_its_request_without_a_fault_of_ours(
    hasty: Any, method: str, answered: bool, caplog: pytest.LogCaptureFixture
) -> None:
    head = f"{method} /health HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    connection = opened(hasty, head if answered else head + b"ZZZ\r\n")
    if answered:
        assert connection.recv(65536).startswith(b"HTTP/1.1 ")
        connection.sendall(b"ZZZ\r\n")
    found = rest(connection)
    if answered:  # the question has its one answer
        assert b"HTTP/1.1" not in found
    else:
        assert found.startswith(b"HTTP/1.1 400 ") and (b"invalid_request" in found) == (method == "GET")
    until(lambda: not hasty.server.server_state.tasks and not open_connections(hasty))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.fixture
def they_stay(hasty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent clients and uploads that stop: there is time to open many, however slow the machine is."""
    monkeypatch.setattr(hasty.server.config.http.__self__, "header_seconds", 60.0)
    long = hasty.config.model_copy(update={"idle_seconds": 60.0})
    monkeypatch.setitem(hasty.server.config.app.state._state, "config", long)


@pytest.mark.usefixtures("they_stay")
def test_however_many_are_silent_everybody_else_is_answered(hasty: Any, recording: bytes) -> None:
    before = dropped(hasty, "room")
    silent = [opened(hasty, HALF if number % 2 else b"") for number in range(MOST + RESERVED + 30)]
    try:
        with hasty.client("all") as client:
            assert client.get("/health").status_code == 200
            assert client.post("/transcribe", files={"file": recording}).status_code == 200
            assert client.get("/ready").status_code == 200
        assert dropped(hasty, "room") - before >= 30 and open_connections(hasty) <= MOST + RESERVED
        assert silent[0].recv(1) == b""  # who was silent for longest
    finally:
        for connection in silent:
            connection.close()


@contextlib.contextmanager
def slow_uploads(running: Any, count: int) -> Iterator[None]:
    connections = [opened(running, post(running, "all")) for _i in range(count)]
    until(lambda: len(running.server.server_state.tasks) == count)
    try:
        yield
    finally:
        for connection in connections:
            connection.close()


@pytest.mark.usefixtures("they_stay")
def test_beyond_the_bound_requests_are_refused_and_whether_the_service_lives_is_still_told(
    hasty: Any, recording: bytes
) -> None:
    ask = {"url": "/transcribe", "files": {"file": recording}}
    with slow_uploads(hasty, MOST), hasty.client("admin") as client:
        silent = [opened(hasty, HALF) for _number in range(RESERVED + 30)]
        for _again in range(2):  # on a connection that was refused, too
            refused = client.post(**ask)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "too_many_connections"
            assert int(refused.headers["Retry-After"]) >= 1 and refused.headers["X-Request-Id"]
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200, path
        assert f"resonance_connections {open_connections(hasty)}.0" in client.get("/metrics").text
        with pytest.raises(InvalidStatus) as caught:
            listening(hasty, "all").close()
        assert caught.value.response.status_code == 503
        assert json.loads(caught.value.response.body)["error"]["code"] == "too_many_connections"
        for connection in silent:
            connection.close()
    with hasty.client("all") as client:
        until(lambda: not hasty.server.server_state.tasks)
        assert client.post(**ask).status_code == 200


@pytest.mark.usefixtures("they_stay")
def test_where_on_every_connection_something_is_under_way_the_next_is_told_so(
    hasty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with slow_uploads(hasty, MOST):
        monkeypatch.setattr(hasty.server.config.http.__self__, "most", MOST)
        status, headers, body = answer(rest(opened(hasty)))
    assert (status, body["error"]["code"]) == (503, "too_many_connections") and headers["retry-after"].isdigit()


def deaf(running: Any, sent: bytes) -> socket.socket:
    """A client that asks and does not read."""
    place = urlsplit(running.address)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((place.hostname, place.port))
    connection.sendall(sent)
    return connection


def test_who_does_not_read_a_stream_is_given_up(hasty: Any, recording: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = hasty.service.stream

    async def talkative(request: Any) -> Any:
        """As if everything had been said many times: more than the kernel keeps."""
        async for piece in stream(request):
            for _i in range(1 if isinstance(piece, Answer) else 1000):
                yield piece

    monkeypatch.setattr(hasty.service, "stream", talkative)
    fields = {"model": "whisper-1", "stream": "true", "include[]": "logprobs"}
    sound = {"file": ("a.wav", recording)}
    asked = httpx2.Request("POST", f"{hasty.address}/v1/audio/transcriptions", data=fields, files=sound)
    head = (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {hasty.tokens['all']}\r\n"
        f"Content-Type: {asked.headers['Content-Type']}\r\nContent-Length: {asked.headers['Content-Length']}\r\n\r\n"
    )
    whole = rest(opened(hasty, head.replace("Host", "Connection: close\r\nHost").encode() + asked.read()))
    assert len(whole) > 200_000, whole
    before = dropped(hasty, "slow_reader")
    begun = time.monotonic()
    with deaf(hasty, head.encode() + asked.read()):
        until(lambda: dropped(hasty, "slow_reader") == before + 1)
        until(lambda: not hasty.server.server_state.tasks and not open_connections(hasty))
    assert time.monotonic() - begun >= IDLE_SECONDS


def test_who_does_not_read_an_answer_is_given_up_and_who_reads_slowly_is_not(hasty: Any) -> None:
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    before = dropped(hasty, "slow_reader")
    with deaf(hasty, asked):
        until(lambda: dropped(hasty, "slow_reader") == before + 1 and not open_connections(hasty))
    whole = len(rest(opened(hasty, asked)))
    slow, found = deaf(hasty, asked), b""
    while piece := slow.recv(whole // 12):
        found += piece
        time.sleep(IDLE_SECONDS / 8)
    slow.close()
    assert len(found) == whole and dropped(hasty, "slow_reader") == before + 1


@pytest.mark.usefixtures("they_stay")
def test_an_answer_that_is_being_taken_is_not_cut_off_while_others_are_silent(
    hasty: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = hasty.server.config.http.__self__
    monkeypatch.setattr(rules, "idle_seconds", 60.0)
    asked = b"GET /openapi.json HTTP/1.1\r\nHost: here\r\n\r\n"
    taking = deaf(hasty, asked)
    until(lambda: len(rules.taking) == 1)
    silent = opened(hasty)
    until(lambda: open_connections(hasty) == 2)
    monkeypatch.setattr(rules, "most", 2)
    another = opened(hasty)
    assert rest(silent) == b""
    assert first(taking)[0] == 200
    until(lambda: not rules.taking and len(rules.waiting) == 2)
    taking.close()
    another.close()
    # Where nobody waits, it is: else those who read slowly would keep everybody out.
    until(lambda: not open_connections(hasty))
    monkeypatch.setattr(rules, "most", 1)
    slow = deaf(hasty, asked)
    until(lambda: len(rules.taking) == 1)
    with hasty.client("all") as client:
        assert client.get("/health").status_code == 200
    assert len(rest(slow)) < 60_000


def listening(running: Any, token: str | None) -> ClientConnection:
    headers = {} if token is None else {"Authorization": f"Bearer {running.tokens.get(token, token)}"}
    return connect(running.address.replace("http", "ws") + "/listen", additional_headers=headers, open_timeout=60)


def last(found: ClientConnection) -> dict[str, Any]:
    """The last message of the service, and then it closes."""
    heard: dict[str, Any] = {}
    with contextlib.suppress(ConnectionClosed):
        while True:
            heard = json.loads(found.recv(timeout=60))
    return heard


@pytest.mark.parametrize("token", [None, "all", "rsn_wrong"])
def test_a_socket_whose_first_message_does_not_come_is_closed_with_the_reason(hasty: Any, token: str | None) -> None:
    begun = time.monotonic()
    with listening(hasty, token) as found:
        assert (said := last(found))["error"]["code"] == "no_start" and said["status"] == 408
    assert time.monotonic() - begun < HEADER_SECONDS + SLACK


@pytest.mark.parametrize("token", [None, "rsn_wrong"])
def test_of_sockets_that_do_not_say_whose_they_are_the_oldest_makes_room(hasty: Any, token: str | None) -> None:
    start = {"type": "start", "patient_id": "anna", "token": hasty.tokens["all"]}
    with listening(hasty, token) as first, listening(hasty, None) as second:
        said = last(first)
        assert said["error"]["code"] == "too_many_connections" and said["error"]["retry_after"] >= 1
        second.send(json.dumps(start))
        assert json.loads(second.recv(timeout=60))["type"] == "ready"


def test_one_account_leaves_sockets_to_the_others(hasty: Any) -> None:
    with contextlib.ExitStack() as stack:
        mine = [stack.enter_context(listening(hasty, "all")) for _i in range(MOST // 2)]
        for one in mine:
            one.send('{"type": "start", "patient_id": "anna"}')
            assert json.loads(one.recv(timeout=60))["type"] == "ready"
        assert last(stack.enter_context(listening(hasty, "all")))["error"]["code"] == "too_many_connections"
        other = stack.enter_context(listening(hasty, "anna"))
        other.send('{"type": "start"}')
        assert json.loads(other.recv(timeout=60))["type"] == "ready"


def test_a_socket_on_which_no_sound_comes_is_closed_with_the_reason(hasty: Any) -> None:
    begun = time.monotonic()
    with listening(hasty, "all") as found:
        found.send('{"type": "start", "patient_id": "anna"}')

        def empty() -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    found.send(b"")
                    time.sleep(IDLE_SECONDS / 5)

        sending = threading.Thread(target=empty)
        sending.start()
        said = last(found)
        sending.join()
    assert (said["status"], said["error"]["code"]) == (408, "idle")
    assert time.monotonic() - begun < IDLE_SECONDS + HEADER_SECONDS + SLACK


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_the_process_may_open_as_many_files_as_there_may_be_connections(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    limits = [(256, 3000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _what, given: limits.append(given))
    allow_files(running.config, 2048)
    assert limits[-1] == (3000, 3000)
    allow_files(running.config.model_copy(update={"max_connections": 100}), 2048)
    assert limits[-1] == (3000, 3000)
    with pytest.raises(ConfigError, match="at most 2680"):
        allow_files(running.config.model_copy(update={"max_connections": 2700}), 2048)
