"""Headers that keep browsers from doing more with an answer than show it to whoever asked."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),  # transcripts stay in no cache
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)
CSP = b"content-security-policy"
NOTHING = b"default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
# The page of the routes has a script of its own, a file beside it and pictures in its style.
DOCS = (
    b"default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    b"connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
DOCS_PATHS = ("/docs", "/docs/oauth2-redirect")
HSTS = (b"strict-transport-security", b"max-age=31536000")


class SecurityHeaders:
    """Adds them to every answer, unless the answer has its own. HSTS only to what was asked for over TLS, which a trusted
    proxy may have said."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        policy = DOCS if scope["path"] in DOCS_PATHS else NOTHING
        wanted = [*HEADERS, (CSP, policy), *([HSTS] if scope.get("scheme") == "https" else [])]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                there = {name.lower() for name, _value in headers}
                headers += [header for header in wanted if header[0] not in there]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, sending)
