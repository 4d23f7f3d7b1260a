"""Requests for a WebSocket that are none, and what a WebSocket and /ready may hold, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from resonance.serve.crowd import MOST_READY

sys.path.insert(0, str(Path(__file__).parents[1]))
from scripted import ScriptedEngine, clip
from serving import request, service_of, settings_for

MOST = 2
IDLE_SECONDS = 1.0
UPGRADE = b"Host: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
KEY = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"


@pytest.fixture
def scripted(start: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., tuple[Any, ScriptedEngine]]]:
    """A service without tokens, whose model a test decides about."""
    with contextlib.ExitStack() as stack:

        def made(**given: Any) -> tuple[Any, ScriptedEngine]:
            usual = {"auth": "off", "port": 0, "max_connections": MOST, "audit_log": tmp_path / "audit"}
            engine = ScriptedEngine()
            given = usual | given
            found = start(settings_for(**given), {}, service=service_of(engine, **given))
            stack.callback(found.stop)
            stack.callback(engine.go.set)
            return found, engine

        yield made


def opened(running: Any, first: bytes = b"") -> socket.socket:
    host, _colon, port = running.address.removeprefix("http://").partition(":")
    found = socket.create_connection((host, int(port)), timeout=60)
    found.sendall(first)
    return found


def rest(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """The status, the headers and the content of what comes until the service closes."""
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            data += piece
    connection.close()
    head, _empty, content = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), json.loads(content)


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends, "it never was"
        time.sleep(0.02)


def nobody_left(running: Any) -> bool:
    state = running.server.server_state
    return not state.connections and not state.tasks


def test_a_websocket_that_cannot_be_read_is_refused_in_the_one_shape_and_nothing_of_it_stays(running: Any) -> None:
    many = b"".join(b"X-%d: a\r\n" % number for number in range(200))
    for headers in (KEY + many, KEY + b"X-Long: " + b"a" * 9000 + b"\r\n", b"", KEY.replace(b"13", b"7")):
        connection = opened(running, b"GET /listen HTTP/1.1\r\n" + UPGRADE + headers + b"\r\n")
        status, said, body = rest(connection)
        assert (status, body["error"]["code"]) == (400, "invalid_request"), headers[:100]
        assert body["error"].keys() == {"message", "type", "param", "code", "hint"}
        assert said["connection"] == "close" and said["content-type"] == "application/json"
        until(lambda: nobody_left(running))


@pytest.mark.parametrize(
    "asked",
    [
        b"GET /listen HTTP/1.1\r\nContent-Length: 1\r\n%s\r\nx",
        b"GET /listen HTTP/1.1\r\nTransfer-Encoding: chunked\r\n%s\r\n0\r\n\r\n",
        b"POST /listen HTTP/1.1\r\nContent-Length: 0\r\n%s\r\n",
        b"GET /listen HTTP/1.0\r\n%s\r\n",
    ],
    ids=["a body", "chunks", "POST", "HTTP/1.0"],
)
def test_what_can_be_no_websocket_is_answered_as_the_request_that_it_is(running: Any, asked: bytes) -> None:
    closing = UPGRADE.replace(b"Connection: Upgrade", b"Connection: Upgrade, close")
    status, headers, body = rest(opened(running, asked % (closing + KEY)))
    assert (status, body["error"]["code"]) == (404, "route_not_found") and headers["x-request-id"]
    until(lambda: nobody_left(running))


def test_a_recording_with_a_stray_upgrade_header_is_transcribed(running: Any, recording: bytes) -> None:
    with running.client() as client:
        client.headers |= {"Connection": "Upgrade", "Upgrade": "websocket"}
        assert client.post("/transcribe", files={"file": recording}).status_code == 200


def test_a_websocket_elsewhere_or_of_another_page_is_refused_in_the_one_shape_and_is_no_fault_of_ours(
    scripted: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    running = scripted()[0].running
    place = running.address.replace("http", "ws")
    for path, origin, refusal in (
        ("/nothing", None, (404, "route_not_found")),
        ("/transcribe", None, (404, "route_not_found")),
        ("/listen", "http://evil.example", (403, "foreign_page")),
    ):
        with pytest.raises(InvalidStatus) as caught:
            connect(place + path, origin=origin, open_timeout=60).close()  # type: ignore[arg-type]
        found = caught.value.response
        assert (found.status_code, json.loads(found.body)["error"]["code"]) == refusal
        assert found.headers["x-request-id"]
    until(lambda: nobody_left(running))
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def under_way(running: Any) -> None:
    """Somebody whose recording keeps the model busy."""
    loop = running.server.servers[0].get_loop()
    asyncio.run_coroutine_threadsafe(running.service.transcribe(request(clip(1))), loop)


def test_however_many_ask_whether_the_model_is_ready_whether_the_service_lives_is_told(
    scripted: Callable[..., Any],
) -> None:
    found, engine = scripted()
    while engine.entered.acquire(blocking=False):
        pass
    engine.go.clear()
    under_way(found.running)
    assert engine.entered.acquire(timeout=60)
    asked = b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    waiting = [opened(found.running, asked) for _number in range(MOST_READY)]
    until(lambda: len(found.running.server.server_state.tasks) == MOST_READY)
    for _number in range(MOST_READY + MOST + 1):
        status, headers, body = rest(opened(found.running, asked))
        assert (status, body["error"]["code"]) == (503, "too_many_connections") and headers["retry-after"].isdigit()
    assert httpx2.get(found.running.address + "/health").status_code == 200
    engine.go.set()
    assert [rest(connection)[0] for connection in waiting] == [200] * MOST_READY
    assert httpx2.get(found.running.address + "/ready").status_code == 200


def test_when_it_stops_a_connection_that_cannot_be_closed_keeps_nobody_from_being_answered(
    scripted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, engine = scripted(drain_seconds=30.0)
    while engine.entered.acquire(blocking=False):
        pass
    engine.go.clear()
    under_way(found.running)
    assert engine.entered.acquire(timeout=60)
    silent = [opened(found.running) for _number in range(3)]
    honest = opened(found.running, b"GET /ready HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    until(lambda: len(found.running.server.server_state.connections) == 4)
    shutdown = H11Protocol.shutdown

    def failing(self: H11Protocol) -> None:
        assert self.cycle is not None, "it was left in a state that nobody thought of"
        shutdown(self)

    monkeypatch.setattr(H11Protocol, "shutdown", failing)
    found.running.server.should_exit = True
    for connection in silent:
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""
        connection.close()
    threading.Timer(0.3, engine.go.set).start()
    assert rest(honest)[0] == 200
    found.thread.join(60)
    assert found.running.service.state.status == "draining" and not found.running.server.cut_off


def frame(kind: int, content: bytes = b"") -> bytes:
    """As a client sends it."""
    return bytes([0x80 | kind, 0x80 | len(content)]) + bytes(4) + content


@pytest.mark.parametrize("between", [b"", frame(2)], ids=["pings alone", "messages between them"])
def test_who_does_not_read_the_answers_to_its_pings_cannot_send_more_and_is_heard_again_when_it_does(
    scripted: Callable[..., Any], between: bytes
) -> None:
    running = scripted(idle_seconds=60.0, header_seconds=60.0)[0].running
    connection = opened(running, b"GET /listen HTTP/1.1\r\n" + UPGRADE + KEY + b"\r\n")
    connection.recv(65536)
    connection.sendall(frame(1, b'{"type": "start"}'))
    connection.recv(65536)
    flood = (frame(9, b"x" * 125) + between) * 500  # uvicorn goes on reading for each message that the session takes
    connection.settimeout(2.0)
    sent, most = 0, 32 << 20
    with contextlib.suppress(TimeoutError):
        while sent < most:
            sent += connection.send(flood[sent % len(flood) :])
    if sent >= most:
        connection.close()
    assert sent < most
    heard = bytearray()

    def read() -> None:
        while b'"done"' not in heard[-1000:] and (piece := connection.recv(1 << 20)):
            heard.extend(piece)

    connection.settimeout(60.0)
    reading = threading.Thread(target=read)
    reading.start()
    connection.sendall(flood[sent % len(flood) :] + frame(1, b'{"type": "end"}'))
    reading.join(60)
    assert b'"done"' in heard[-1000:]
    connection.close()


def test_a_websocket_behind_an_answer_that_was_slowly_taken_lives_on(scripted: Callable[..., Any]) -> None:
    running = scripted(idle_seconds=IDLE_SECONDS, header_seconds=60.0)[0].running
    for listens in running.server.servers[0].sockets:
        listens.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    host, _colon, port = running.address.removeprefix("http://").partition(":")
    connection.connect((host, int(port)))
    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    connection.sendall(b"GET /listen HTTP/1.1\r\n" + UPGRADE + KEY + b"\r\n")
    until(lambda: any(hasattr(one, "handshake_complete") for one in running.server.server_state.connections))
    data = b""
    while b" 101 " not in data:
        piece = connection.recv(65536)
        assert piece
        data += piece
    time.sleep(2.5 * IDLE_SECONDS)
    connection.sendall(frame(1, b'{"type": "start"}'))
    while b'"ready"' not in data:
        piece = connection.recv(65536)
        assert piece
        data += piece
    connection.close()
