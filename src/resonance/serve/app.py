"""The application: what lies around every request, how refusals look, and which routes there are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from resonance.config_serve import ServeConfig
from resonance.errors import AdapterError, AudioError, DataError, ModelError, ResonanceError, ShardError
from resonance.messages import _
from resonance.serve import listen, openapi, routes_health, routes_openai, routes_patients, routes_transcribe
from resonance.serve.audit import Audited, AuditLog
from resonance.serve.auth import Auth
from resonance.serve.crowd import AtMost, Sockets, refuse
from resonance.serve.faults import ServiceError, store_unreachable
from resonance.serve.fields import shown
from resonance.serve.origins import OwnPagesOnly
from resonance.serve.outer import Outer, Receive, Scope, Send, internal_error, log, where
from resonance.serve.security_headers import SecurityHeaders
from resonance.serve.service import Service
from resonance.serve.uploads import ReadingBudget

ROUTERS = (routes_health, routes_transcribe, routes_patients, routes_openai, listen)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def create_app(service: Service, auth: Auth, config: ServeConfig) -> FastAPI:
    """The service over HTTP. Its lifespan starts the service, and drains it when the server stops.

    Raises ConfigError where the audit log cannot be written.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            await service.drain(config.drain_seconds)
            record.close()

    # FastAPI's own page of the routes takes its script from another company's network.
    app = FastAPIOffline(
        docs_url="/docs",
        redoc_url=None,
        static_url="/docs/files",
        title="Resonance",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.service, app.state.auth, app.state.config = service, auth, config
    app.state.budget, app.state.sockets = ReadingBudget(), Sockets(config.max_connections)
    for module in ROUTERS:
        app.include_router(module.router)
    elsewhere = app.router.default

    async def nowhere(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse(scope, send, no_socket(scope["path"]))
        else:
            await elsewhere(scope, receive, send)

    app.router.default = nowhere
    handlers: dict[type[Exception], Callable[[Request, Any], Response]] = {
        ServiceError: refused,
        HTTPException: refused_by_starlette,
        RequestValidationError: invalid,
        ResonanceError: failed,
        OSError: failed,
        ClientDisconnect: gone,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    record = AuditLog(config.audit_log)
    # The last added is the outermost.
    app.add_middleware(AtMost, most=config.max_connections)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=METHODS,
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After", "X-Resonance-Adapter", "X-Resonance-Base"],
        )
    app.add_middleware(OwnPagesOnly, config=config)
    app.add_middleware(Audited, log=record)
    app.add_middleware(Outer, count=service.metrics.request)
    app.add_middleware(SecurityHeaders)
    openapi.describe(app, config)
    return app


def refused(request: Request, error: ServiceError) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


def refused_by_starlette(request: Request, error: HTTPException) -> Response:
    """Unknown routes, wrong methods, and what starlette itself finds wrong with a request."""
    if error.status_code == 405:
        allowed = methods_of(request)
        fault = ServiceError(
            405,
            "method_not_allowed",
            _("{method} is not possible here.").format(method=shown(request.method)),
            _("Use {methods}.").format(methods=", ".join(allowed)),
        )
        return JSONResponse(fault.body, 405, {"Allow": ", ".join(allowed)})
    if error.status_code == 404:
        fault = ServiceError(
            404,
            "route_not_found",
            _("There is nothing at {path}.").format(path=shown(request.url.path)),
            _("/docs lists what there is."),
        )
    else:
        fault = ServiceError(error.status_code, "invalid_request", str(error.detail), _("/docs says how to ask."))
    return JSONResponse(fault.body, error.status_code, dict(error.headers or {}))


def no_socket(path: str) -> ServiceError:
    return ServiceError(
        404,
        "route_not_found",
        _("There is no WebSocket at {path}.").format(path=shown(path)),
        _("Connect to {path}.").format(path="/listen"),
    )


def methods_of(request: Request) -> list[str]:
    """All methods that some route has for this path: starlette's own answer names those of the first alone."""
    found: set[str] = set()
    for method in METHODS:
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.add(method)
    return sorted(found)


def invalid(request: Request, error: RequestValidationError) -> Response:
    """Of the path, the query or a JSON body, by FastAPI. What was sent is not repeated."""
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"][1:]) or str(found["loc"][0])
    fault = ServiceError(
        400,
        "invalid_value",
        _("{name} is not as it must be: {reason}.").format(name=shown(place), reason=found["msg"]),
        _("/docs says how to ask."),
        param=place[:100],
    )
    return JSONResponse(fault.body, 400)


def gone(request: Request, error: ClientDisconnect) -> Response:
    """While it was sending. Nobody reads this; 499 is what nginx counts it as."""
    return Response(status_code=499)


def failed(request: Request, error: Exception) -> Response:
    """What an adapter is refused for is told. Where the store fails is for the log alone: it names places of this machine."""
    if isinstance(error, AdapterError):
        fault = ServiceError(
            422,
            "adapter_unusable",
            str(error),
            _("Upload the adapter of this person again, or roll back to an older version."),
        )
        return refused(request, fault)
    if isinstance(error, AudioError | ModelError):
        return refused(request, ServiceError(400, "invalid_request", str(error), _("/docs says how to ask.")))
    request_id = request.state.request_id
    if isinstance(error, ShardError):
        log.warning("request %s: %s", request_id, error)
        fault = store_unreachable()
    elif isinstance(error, DataError | OSError):
        log.error("request %s: %s at %s", request_id, error, where(error))
        fault = ServiceError(
            500,
            "storage_failed",
            _("The place where the adapters are kept does not do what it should."),
            _("The log of the service says more. Tell who runs it."),
        )
    else:
        log.error("request %s: %s at %s", request_id, type(error).__name__, where(error))
        fault = internal_error()
    return refused(request, fault)
