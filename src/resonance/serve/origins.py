"""With authentication off: that it is a program of this machine that asks, and no web page in its browser.

A page of any site may send forms to 127.0.0.1, and one whose name turns into 127.0.0.1 after it was loaded (DNS
rebinding) may read the answers too. What it cannot do is hide where it comes from: Host and Origin.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from resonance.config_serve import ServeConfig
from resonance.messages import _
from resonance.serve.crowd import refuse
from resonance.serve.faults import ServiceError
from resonance.serve.security_headers import App, Receive, Scope, Send


class OwnPagesOnly:
    """Refuses what other web pages send, with 403 foreign_page, where there are no tokens to ask for."""

    def __init__(self, app: App, config: ServeConfig) -> None:
        self.app, self.config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        checked = self.config.auth == "off" and scope["type"] in ("http", "websocket")
        if not checked or self._own(dict(scope["headers"])):
            await self.app(scope, receive, send)
            return
        foreign = ServiceError(
            403,
            "foreign_page",
            _("This web page may not use the service."),
            _("Name it in --cors_origins, or use --auth token."),
        )
        await refuse(scope, send, foreign)

    def _own(self, headers: dict[bytes, bytes]) -> bool:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and origin not in self.config.cors_origins and _place(origin) != host:
            return False
        # --insecure: others reach the service, by names that it does not know.
        return self.config.insecure or not host or self._names_this_machine(host)

    def _names_this_machine(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self.config.host.strip("[]").lower()):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _place(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
