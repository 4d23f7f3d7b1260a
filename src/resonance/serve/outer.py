"""Around every request: its name, its count, and what becomes of an exception that nobody expected."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from resonance.messages import _
from resonance.serve.faults import ServiceError, draining

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Count = Callable[[str, int, float], None]  # route, status, seconds

_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
log = logging.getLogger("resonance.serve")


class Outer:
    """Gives every request an X-Request-Id, taken from the client's where that is harmless, and counts it by route and status.

    An exception becomes 500 internal_error. What is logged is its class and the lines of code, never its text or the values:
    they may be what somebody said. ServerErrorMiddleware of starlette would log both.
    """

    def __init__(self, app: App, count: Count | None = None) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        request_id = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        begun, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                status = message.get("status", 101)
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id.encode())]}
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except asyncio.CancelledError:
            # The time to finish what is under way is over, and uvicorn ends it: whoever asked is told.
            if scope["type"] == "http" and not status:
                await fault(sending, draining())
        except Exception as error:
            log.error("request %s: %s at %s", request_id, type(error).__name__, where(error))
            if scope["type"] == "http" and not status:
                await fault(sending, internal_error())
            elif scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1011})
        finally:
            if self.count and status:
                route = getattr(scope.get("route"), "path", "other")
                self.count(route, scope["state"].get("status", status), time.monotonic() - begun)


async def fault(send: Send, error: ServiceError, kind: str = "") -> None:
    """kind: `websocket.` where it is sent in place of a WebSocket."""
    headers, content = rendered(error)
    await send({"type": f"{kind}http.response.start", "status": error.status, "headers": headers})
    await send({"type": f"{kind}http.response.body", "body": content})


def rendered(error: ServiceError) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body."""
    content = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(error.retry_after).encode()))
    return headers, content


def internal_error() -> ServiceError:
    return ServiceError(
        500,
        "internal_error",
        _("Something went wrong in the service."),
        _("The log has it under the X-Request-Id of this answer. Ask again; if it happens again, tell who runs it."),
    )


def where(error: BaseException) -> str:
    """The lines of code that an exception came through, without their values."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames))
