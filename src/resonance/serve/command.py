"""`resonance serve`: the application on a port, until a signal says stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

import uvicorn

from resonance.config_serve import ServeConfig
from resonance.errors import ResonanceError
from resonance.messages import _
from resonance.serve.app import create_app
from resonance.serve.auth import Auth, check_exposure
from resonance.serve.connections import Rules, allow_files
from resonance.serve.listen import stopping_of
from resonance.serve.service import Service, create_service

BACKLOG = 2048  # connections that may wait to be taken
MESSAGE_BYTES = 1 << 20  # of one message of a WebSocket: half a minute of PCM
WAIT_STEP_SECONDS = 0.1


def serve(config: ServeConfig) -> int:
    """Answer until SIGTERM or Ctrl-C. Returns 0 where all requests under way have been answered by then, else 128 + the
    signal's number. Raises ResonanceError where it cannot begin."""
    check_exposure(config)
    if config.engine == "ray":
        from resonance.serve.ray_app import serve_with_ray

        return serve_with_ray(config)
    allow_files(config, BACKLOG)
    listening = bind(config)
    with listening:
        service = create_service(config)
        auth = Auth.from_config(config)
        server = Server(service, auth, config)
        announce(config, listening.getsockname()[1])
        asyncio.run(server.serve_on(listening))
    if server.failure:
        raise ResonanceError(server.failure)
    if server.cut_off:
        # The model's thread computes still, and C++ would abort a process that ends under it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + server.signal)
    return 0


def bind(config: ServeConfig) -> socket.socket:
    """A socket that waits for connections. Raises ResonanceError where the port is taken or the address is not ours."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sends small answers at once (TCP_NODELAY) only where the protocol is named: else /health took 45 ms instead of 0.6.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name != "nt":  # on Windows it would let two services share a port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((config.host, config.port))
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ResonanceError(
                _(
                    "Port {port} of {host} is taken: another program listens there. Choose another with --port, or 0 for "
                    "any that is free."
                ).format(port=config.port, host=config.host)
            ) from None
        raise ResonanceError(
            _("Nothing can listen on {host}, port {port} ({reason}). Choose others with --host and --port.").format(
                host=config.host, port=config.port, reason=error.strerror or error
            )
        ) from None
    return found


def announce(config: ServeConfig, port: int) -> None:
    """Where, what, who may, and how to try it."""
    shown = f"[{config.host}]" if ":" in config.host else config.host
    here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(shown, shown)
    lines = [
        _("Listening on {address}. The model, {model}, is being loaded.").format(
            address=f"http://{shown}:{port}", model=config.model
        ),
        _("Adapters: {place}").format(place=config.adapters)
        if config.adapters
        else _("Adapters: none; only the base model answers."),
    ]
    header = ""
    if config.auth == "off":
        lines.append(_("Open to everybody who reaches this address: --auth is off."))
    else:
        lines.append(_("Protected: requests need a token. Make one with: resonance token create"))
        header = '-H "Authorization: Bearer TOKEN" '
    lines += [
        _("Try: {command}").format(command=f"curl {header}-F file=@recording.wav http://{here}:{port}/transcribe"),
        _("Every route: {address}").format(address=f"http://{here}:{port}/docs"),
    ]
    print("\n".join(lines), flush=True)


class Server(uvicorn.Server):
    """Uvicorn that says when the model is ready, refuses new work at the first signal, and dies at the second."""

    def __init__(self, service: Service, auth: Auth, config: ServeConfig) -> None:
        app = create_app(service, auth, config)
        rules = Rules.of(config, service.metrics.connection_dropped)
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,  # the audit log has who asked for what
                server_header=False,
                timeout_keep_alive=math.ceil(config.idle_seconds),
                timeout_graceful_shutdown=math.ceil(config.drain_seconds),
                http=cast(Any, rules.http),  # what uvicorn does with a class is to call it
                ws=cast(Any, rules.websocket),
                backlog=BACKLOG,
                ws_max_size=MESSAGE_BYTES,
                proxy_headers=bool(config.trusted_proxies),
                forwarded_allow_ips=config.trusted_proxies or None,
                lifespan="on",
            )
        )
        service.metrics.watch_connections(lambda: len(self.server_state.connections))
        self.service = service
        self.stopping = stopping_of(app)
        self.signal = 0
        self.cut_off = False  # whether a request was under way when the time was over
        self.failure = ""  # why the model could not be loaded
        self.watching: asyncio.Task[None] | None = None

    async def serve_on(self, listening: socket.socket) -> None:
        await self.serve(sockets=[listening])

    async def main_loop(self) -> None:
        self.watching = asyncio.create_task(self._say_when_ready())
        await super().main_loop()

    async def _say_when_ready(self) -> None:
        while (state := self.service.state).status == "loading":
            await asyncio.sleep(WAIT_STEP_SECONDS)
        if state.status == "ready":
            print(_("Ready."), flush=True)
        elif state.status == "broken":
            # Nothing that comes later mends a model that cannot be loaded, and who waits for it should know.
            self.failure = state.reason
            self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.watching:
            self.watching.cancel()
        self.stopping.set()
        watch = asyncio.create_task(self._see_cut_off())
        try:
            await super().shutdown(sockets)
        finally:
            watch.cancel()

    async def _see_cut_off(self) -> None:
        """Uvicorn cancels what is left when its time is over, and does not say so."""
        await asyncio.sleep(math.ceil(self.config.timeout_graceful_shutdown or 0))
        self.cut_off = bool(self.server_state.tasks)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own raises the signals again when all is done, which would make a failure of an orderly end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.signal = sig
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self.should_exit = True
        print(_("Stopping: what is under way is answered first. Once more stops at once."), file=sys.stderr, flush=True)
