"""The front deployment: the routes of `create_app` before a `RemoteService`. Runs in a process of Ray's."""

from __future__ import annotations

from typing import Any

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from resonance.config_serve import ServeConfig
from resonance.serve.app import create_app
from resonance.serve.auth import Auth
from resonance.serve.remote_service import RemoteService
from resonance.serve.store import AdapterStore


def build(config: ServeConfig, copies: Any) -> Any:
    """The ASGI application."""
    store = None if config.adapters is None else AdapterStore(config.adapters)
    app: Any = create_app(RemoteService(config, copies, store), Auth.from_config(config), config)
    if config.trusted_proxies:
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=config.trusted_proxies)
    return app
