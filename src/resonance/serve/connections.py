"""Connections, as uvicorn's protocols have them, that do not wait for ever: for a client that says nothing, and for one that
takes nothing of its answer. Uvicorn has a time limit for those alone that are kept for a next request.

On a connection, a request is under way, or it waits for one: silent, with half a request's head, behind an answer. Those that
wait are no reason to refuse anybody: where too many are open, the one that has waited longest is closed; where none waits, one
whose answer is still being taken. How many requests may be under way is the application's business (`resonance.serve.crowd`).
"""

from __future__ import annotations

import asyncio
import http
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import h11
from uvicorn._types import ASGIReceiveEvent, ASGISendEvent
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from resonance.config_serve import ServeConfig
from resonance.errors import ConfigError
from resonance.messages import _
from resonance.serve.crowd import RESERVED
from resonance.serve.faults import ServiceError, too_many_connections
from resonance.serve.outer import rendered, where

log = logging.getLogger("resonance.serve")
OTHER_FILES = 256  # that the process may have open: of the model, adapters, decoders
LEAST_RATE = 1000  # bytes a second that a client must take, where it is slower than the service


@dataclass(eq=False)
class Rules:
    """How long anything is waited for, and who waits. Of one server."""

    header_seconds: float
    idle_seconds: float
    body_seconds: float  # for the rest of a body that nobody wants, behind its answer
    most: int  # connections
    dropped: Callable[[str], None]  # is told why a connection was closed that the client had open
    waiting: dict[Http, None] = field(default_factory=dict)  # the one that has waited longest first
    taking: dict[Http, None] = field(default_factory=dict)  # answered, and not all of the answer is taken

    @classmethod
    def of(cls, config: ServeConfig, dropped: Callable[[str], None]) -> Rules:
        most = config.max_connections + RESERVED
        return cls(config.header_seconds, config.idle_seconds, config.deadline_seconds, most, dropped)

    def http(self, **given: Any) -> Http:
        """A connection, for uvicorn."""
        return Http(self, **given)

    def websocket(self, **given: Any) -> Listening:
        return Listening(self, **given)


class Taken:
    """Of a protocol: what it writes has to be taken by the client."""

    rules: Rules
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _taking: asyncio.TimerHandle | None = None
    _left = 0  # bytes not taken when last looked at

    def stalled(self) -> None:
        """There is something that the client does not take at once."""
        self._left = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(self.rules.idle_seconds, self._look)

    def flows(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _look(self) -> None:
        taken = self._left - self.transport.get_write_buffer_size()
        if taken >= LEAST_RATE * self.rules.idle_seconds:
            self.stalled()
        else:
            self._taking = None
            self.rules.dropped("slow_reader")
            self.transport.abort()

    def shutdown(self) -> None:
        """When the server stops. One connection that cannot is no reason not to answer the others first."""
        try:
            super().shutdown()  # type: ignore[misc]
        except Exception as error:
            log.error("a connection cannot be closed: %s at %s", type(error).__name__, where(error))
            self.transport.abort()


class Http(Taken, H11Protocol):
    """A connection of HTTP. What uvicorn itself answers has the service's one shape here."""

    def __init__(self, rules: Rules, **given: Any) -> None:
        super().__init__(**given)
        self.rules = rules
        self._timer: asyncio.TimerHandle | None = None  # until a request must have come
        self._lingering = False  # what that waits for is the end of a body
        self._upgraded = False

    @property
    def _busy(self) -> bool:
        return self._upgraded or (self.cycle is not None and not self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # Whatever the kernel does not take at once is a reason to look at the clock.
        transport.set_write_buffer_limits(high=0)
        waiting = self.rules.waiting
        if len(self.connections) > self.rules.most:
            oldest = next(iter(waiting or self.rules.taking), None)
            if oldest is None:
                self.rules.dropped("room")
                self._refuse(too_many_connections())
                return
            oldest._drop("room")
        waiting[self] = None
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._busy or self.transport.is_closing():
            self._rest()
            return
        lingering = self.conn.their_state is h11.SEND_BODY
        if self._timer is None or (self._lingering and not lingering):
            self._wait(lingering=lingering)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._stand_by()

    def _should_upgrade(self) -> bool:
        """Whether it can be a WebSocket. Where not, the request is what it is without the header (RFC 9110, section 7.8)."""
        headers = dict(self.headers)
        body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
        possible = self.scope["method"] == "GET" and self.scope["http_version"] == "1.1" and not body
        return possible and super()._should_upgrade()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        self._rest()
        super().handle_websocket_upgrade(event)
        if self._taking is not None:
            # Of the answer before: when it is taken, the transport tells the other protocol.
            self.flows()
            cast(Listening, self.transport.get_protocol()).pause_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        self.flows()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled()

    def resume_writing(self) -> None:
        super().resume_writing()
        self.flows()
        self._stand_by()

    def send_400_response(self, msg: str) -> None:
        self._refuse(
            ServiceError(
                400,
                "invalid_request",
                _("This is no HTTP request that can be read."),
                _("Ask with a program that speaks HTTP/1.1, such as curl."),
            )
        )

    def _wait(self, *, lingering: bool = False) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._lingering = lingering
        seconds = self.rules.body_seconds if lingering else self.rules.header_seconds
        self._timer = self.loop.call_later(seconds, self._too_slow)

    def _stand_by(self) -> None:
        """Nothing is under way, where that is so. What is answered and not yet taken is cut off last."""
        if self._busy or self.transport.is_closing():
            return
        self.rules.taking.pop(self, None)
        (self.rules.waiting if self._taking is None else self.rules.taking)[self] = None

    def _leave(self) -> None:
        self.rules.waiting.pop(self, None)
        self.rules.taking.pop(self, None)

    def _rest(self) -> None:
        self._leave()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if not begun:  # nobody reads an answer to a question that was not asked
            self._drop("silent")
            return
        self.rules.dropped("silent")
        self._refuse(
            ServiceError(
                408,
                "request_too_slow",
                _("The request did not come within {seconds:g} s.").format(seconds=self.rules.header_seconds),
                _("Send it again over a better connection."),
            )
        )

    def _drop(self, why: str) -> None:
        self._leave()
        self.rules.dropped(why)
        self.transport.abort()

    def _refuse(self, error: ServiceError) -> None:
        """Say so where nothing has been said yet, and close. A request under way is over for whoever answers it."""
        head = False
        if self._busy:
            head = self.cycle.scope["method"] == "HEAD"
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers, content = rendered(error)
            response = h11.Response(
                status_code=error.status,
                headers=[*headers, (b"connection", b"close")],
                reason=http.HTTPStatus(error.status).phrase.encode(),
            )
            for event in (response, h11.Data(data=b"" if head else content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Listening(Taken, WebSocketsSansIOProtocol):
    """A WebSocket whose closing is left to the session when the server stops: uvicorn's own closes at once, and what the
    person has just said would not be answered."""

    def __init__(self, rules: Rules, **given: Any) -> None:
        super().__init__(**given)
        self.rules = rules

    def shutdown(self) -> None:
        if not self.handshake_complete or self.close_sent:
            super().shutdown()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A head that h11 can read and websockets cannot: too many headers, or too long ones. Uvicorn says nothing then.
        if not self.handshake_initiated and not self.transport.is_closing():
            self._refuse()

    def handle_connect(self, event: Request) -> None:
        if self.conn.accept(event).status_code == 101:
            super().handle_connect(event)
        else:
            self._refuse()

    def connection_lost(self, exc: Exception | None) -> None:
        self.flows()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()  # who does not read the answers to its pings may not send more of them
        self.stalled()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.read_paused:
            self.transport.resume_reading()
        self.flows()

    async def receive(self) -> ASGIReceiveEvent:
        message = await super().receive()
        self._stay_paused()
        return message

    async def send(self, message: ASGISendEvent) -> None:
        await super().send(message)
        # An answer in place of a WebSocket was sent: without this, uvicorn would log that the handshake had been forgotten.
        self.handshake_complete = self.handshake_complete or self.close_sent
        self._stay_paused()

    def _stay_paused(self) -> None:
        """Uvicorn has let the client send, for reasons of its own."""
        if not self.writable.is_set():
            self.transport.pause_reading()

    def _refuse(self) -> None:
        """There is no WebSocket."""
        error = ServiceError(
            400,
            "invalid_request",
            _("This is no beginning of a WebSocket that can be read."),
            _("Connect with a program that speaks WebSocket (RFC 6455), with few and short headers."),
        )
        headers, content = rendered(error)
        lines = [b"HTTP/1.1 400 Bad Request", *(b": ".join(header) for header in [*headers, (b"connection", b"close")])]
        self.handshake_initiated = self.handshake_complete = self.close_sent = True
        self.transport.write(b"\r\n".join([*lines, b"", content]))
        self.transport.close()


def allow_files(config: ServeConfig, backlog: int) -> None:
    """Let the process have as many files open as there may be connections. Raises ConfigError where the system does not.

    backlog: connections that may be taken before the first of them is looked at.
    """
    if os.name == "nt":
        return
    import resource

    needed = config.max_connections + RESERVED + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else needed + backlog
    if most < needed:
        raise ConfigError(
            [
                _(
                    "--max_connections {given} needs {needed} open files, and the system allows {most}. Give at most "
                    "{possible}, or let the system allow more (ulimit -n, LimitNOFILE of systemd)."
                ).format(
                    given=config.max_connections,
                    needed=needed,
                    most=most,
                    possible=max(1, most - RESERVED - OTHER_FILES),
                )
            ]
        )
    if soft != resource.RLIM_INFINITY and soft < min(most, needed + backlog):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, needed + backlog), hard))
