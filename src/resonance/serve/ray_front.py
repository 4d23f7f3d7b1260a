"""The front deployment: the routes of `create_app` before a `RemoteService`. Runs in a process of Ray's."""

from __future__ import annotations

from typing import Any, cast

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from resonance.config_serve import ServeConfig
from resonance.serve.app import create_app
from resonance.serve.auth import Auth
from resonance.serve.outer import App, Message, Receive, Scope, Send
from resonance.serve.remote_service import RemoteService
from resonance.serve.service import Service
from resonance.serve.store import AdapterStore


def build(config: ServeConfig, copies: Any, key: bytes) -> Any:
    """The ASGI application. key: what the copies were given, for `mark`."""
    store = None if config.adapters is None else AdapterStore(config.adapters)
    # It has all of `Service` that the routes use; tests go through every route.
    service = cast(Service, RemoteService(config, copies, store, key))
    app = create_app(service, Auth.from_config(config), config)
    if config.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=config.trusted_proxies)
    app.add_middleware(OneRequestId)
    return app


class OneRequestId:
    """Ray's proxy gives every request an X-Request-Id, which ours takes, and writes it into the answer itself."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if "headers" in message:
                others = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
                message = {**message, "headers": others}
            await send(message)

        await self.app(scope, receive, sending)
