"""Who asked for what: a line of JSON for each request, without a word of what was said."""

from __future__ import annotations

import json
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resonance.errors import ConfigError
from resonance.messages import _
from resonance.serve.security_headers import App, Message, Receive, Scope, Send

UNRECORDED = ("/health", "/ready", "/metrics")  # asked for every few seconds by machines
LONGEST = 100


class AuditLog:
    """Appends to a file, or to stderr. The file may be moved away by a program that rotates logs: a new one is begun.

    Safe to use from several threads and processes: a line is one write to the end of the file.
    """

    def __init__(self, path: Path | None) -> None:
        """Raises ConfigError when the file cannot be written."""
        self.path = path
        self._lock = threading.Lock()
        self._file: int | None = None
        self._state: tuple[int, int] | None = None
        self._failing = False
        if path:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._open(path)
            except OSError as error:
                raise ConfigError(
                    [
                        _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                            path=path, reason=error.strerror or error
                        )
                    ]
                ) from None

    def record(
        self,
        *,
        request_id: str,
        account: str | None,
        patient: str | None,
        action: str,
        status: int,
        audio_seconds: float | None = None,
    ) -> None:
        """One line. `action`: the method and the pattern of the route, never the path that was asked for."""
        row: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request": _short(request_id),
            "account": _short(account),
            "patient": _short(patient),
            "action": _short(action),
            "status": status,
            "audio_seconds": None if audio_seconds is None else round(audio_seconds, 2),
        }
        line = json.dumps(row) + "\n"  # in ASCII: no text of a client can begin a line of its own
        with self._lock:
            if self.path is None:
                print(line, end="", file=sys.stderr, flush=True)
                return
            try:
                self._write(self.path, line.encode())
                self._failing = False
            except OSError as error:
                if not self._failing:  # once, not for each request: a full disk stays full for a while
                    text = _("{path}: cannot be written ({reason}). Requests are answered without a record.")
                    print(text.format(path=self.path, reason=error.strerror or error), file=sys.stderr, flush=True)
                self._failing = True

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def _write(self, path: Path, line: bytes) -> None:
        try:
            found = path.stat()
            moved = (found.st_dev, found.st_ino) != self._state
        except FileNotFoundError:
            moved = True
        if moved or self._file is None:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._open(path)
        assert self._file is not None
        os.write(self._file, line)

    def _open(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        found = os.fstat(self._file)
        self._state = (found.st_dev, found.st_ino)


class Audited:
    """Records each request when its answer has ended, refused ones too.

    Routes tell what they know in `request.state`: `account`, `patient` (checked), `audio_seconds`, and of a WebSocket
    that was refused `status`. `request_id` is there
    already.
    """

    def __init__(self, app: App, log: AuditLog) -> None:
        self.app, self.log = app, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] not in ("http", "websocket")
            or scope["path"] in UNRECORDED
            or scope.get("method") == "OPTIONS"
        ):
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        status = 500 if scope["type"] == "http" else 403

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start", "websocket.accept"):
                status = message.get("status", 101)
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.log.record(
                request_id=state.get("request_id", ""),
                account=state.get("account"),
                patient=state.get("patient"),
                action=f"{scope.get('method', 'WEBSOCKET')} {route}",
                status=state.get("status", status),
                audio_seconds=state.get("audio_seconds"),
            )


def _short(text: str | None) -> str | None:
    return None if text is None else text[:LONGEST]
