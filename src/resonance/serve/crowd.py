"""How many may be here at a time: requests and WebSockets in all, and sockets of which nobody knows yet whose they are."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator

from resonance.serve.audit import UNRECORDED
from resonance.serve.faults import ServiceError, too_many_connections
from resonance.serve.outer import App, Receive, Scope, Send, fault

RESERVED = 64  # connections beyond those of requests under way: for being told so, and for /health, /ready and /metrics
READY = "/ready"  # of those three, the one that may take long
MOST_READY = RESERVED // 2
STRANGERS = 1 / 4  # of all connections
ONE_ACCOUNT = 1 / 2
DENIAL = "websocket.http.response"  # ASGI's extension: an answer in place of a WebSocket


class AtMost:
    """Refuses requests and WebSockets while `most` are under way, with 503 too_many_connections.

    By request and not by connection: so whoever asks is told in the one shape, and what machines ask for to see whether the
    service lives is always answered. /ready waits for the model, and has a bound of its own, that leaves connections to
    /health. Connections on which nothing is under way are `resonance.serve.connections`' business.
    """

    def __init__(self, app: App, most: int) -> None:
        self.app = app
        self.most = {False: most, True: MOST_READY}  # by whether it is /ready
        self.open = dict.fromkeys(self.most, 0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        ready = scope.get("path") == READY
        if scope["type"] not in ("http", "websocket") or (scope["path"] in UNRECORDED and not ready):
            await self.app(scope, receive, send)
        elif self.open[ready] >= self.most[ready]:
            await refuse(scope, send, too_many_connections())
        else:
            self.open[ready] += 1
            try:
                await self.app(scope, receive, send)
            finally:
                self.open[ready] -= 1


async def refuse(scope: Scope, send: Send, error: ServiceError) -> None:
    if scope["type"] == "http":
        await fault(send, error)
    elif DENIAL in scope.get("extensions", ()):
        await fault(send, error, "websocket.")
    else:
        await send({"type": "websocket.close", "code": 1013})  # before it is accepted: 403


class Sockets:
    """The WebSockets that are open. Used from one event loop."""

    def __init__(self, most: int) -> None:
        self._most_strangers, self._most_of_one = max(1, int(STRANGERS * most)), max(1, int(ONE_ACCOUNT * most))
        self._strangers: dict[object, Callable[[ServiceError], None]] = {}
        self._of: Counter[str] = Counter()

    @contextlib.contextmanager
    def stranger(self, leave: Callable[[ServiceError], None]) -> Iterator[None]:
        """One that has not said yet whose it is. There is always room for another: `leave` is called where this one has to
        make it, because it has been silent for longest."""
        if len(self._strangers) >= self._most_strangers:
            oldest = next(iter(self._strangers))
            self._strangers.pop(oldest)(too_many_connections())
        me = object()
        self._strangers[me] = leave
        try:
            yield
        finally:
            self._strangers.pop(me, None)

    @contextlib.contextmanager
    def of(self, account: str) -> Iterator[None]:
        """Raises ServiceError 503 where the account has as many as one may."""
        if self._of[account] >= self._most_of_one:
            raise too_many_connections()
        self._of[account] += 1
        try:
            yield
        finally:
            self._of[account] -= 1
            if not self._of[account]:
                del self._of[account]
