"""The audit log: who asked for what, whole lines, no content, and a new file when the old one was moved."""

from __future__ import annotations

import asyncio
import json
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket

from resonance.errors import ConfigError
from resonance.serve.audit import Audited, AuditLog


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record(log: AuditLog, **changes: Any) -> None:
    usual: dict[str, Any] = {
        "request_id": "r1",
        "account": "phone",
        "patient": "anna",
        "action": "POST /transcribe",
        "status": 200,
        "audio_seconds": 3.14159,
    }
    log.record(**{**usual, **changes})


def test_a_line_says_who_asked_for_whom_when_and_with_what_result(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "logs" / "audit.jsonl")
    record(log)
    log.close()
    [row] = rows(tmp_path / "logs" / "audit.jsonl")
    assert datetime.fromisoformat(row.pop("time")).utcoffset() is not None
    assert row == {
        "request": "r1",
        "account": "phone",
        "patient": "anna",
        "action": "POST /transcribe",
        "status": 200,
        "audio_seconds": 3.14,
    }
    assert (tmp_path / "logs" / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_what_a_client_sends_cannot_begin_a_line(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    for text in ('x\n{"account": "admin"}', "\u2028", "😀" * 5000, "\ud800"):
        record(log, request_id=text, account=text, patient=text, action=text)
    log.close()
    content = (tmp_path / "audit.jsonl").read_bytes()
    assert content.count(b"\n") == 4 == len(rows(tmp_path / "audit.jsonl"))
    assert len(content) < 10_000


def test_a_new_file_is_begun_when_the_old_one_is_moved_or_deleted(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    record(log, request_id="1")
    path.rename(tmp_path / "audit.jsonl.1")
    record(log, request_id="2")
    path.unlink()
    record(log, request_id="3")
    log.close()
    assert [row["request"] for row in rows(tmp_path / "audit.jsonl.1")] == ["1"]
    assert [row["request"] for row in rows(path)] == ["3"]


def test_lines_of_several_threads_and_logs_stay_whole(tmp_path: Path) -> None:
    logs = [AuditLog(tmp_path / "audit.jsonl") for _ in range(4)]
    threads = [
        threading.Thread(target=lambda log=log, i=i: [record(log, request_id=f"{i}.{n}") for n in range(100)])
        for i, log in enumerate(logs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    expected = {f"{i}.{n}" for i in range(4) for n in range(100)}
    assert {row["request"] for row in rows(tmp_path / "audit.jsonl")} == expected


def test_a_place_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "file" / "audit.jsonl"):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="cannot be written"):
            AuditLog(path)


def test_requests_go_on_when_the_log_fails_later_which_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "logs" / "audit.jsonl"
    log = AuditLog(path)
    path.unlink()
    path.parent.rmdir()
    for _ in range(3):
        record(log)
    assert capsys.readouterr().err.count("without a record") == 1
    path.parent.mkdir()
    record(log)
    log.close()
    assert len(rows(path)) == 1


def test_without_a_file_the_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    record(AuditLog(None))
    assert json.loads(capsys.readouterr().err)["account"] == "phone"


async def transcribe(request: Request) -> PlainTextResponse:
    request.state.account, request.state.patient = "phone", request.path_params["patient_id"]
    request.state.audio_seconds = 2.5
    if request.query_params.get("broken"):
        raise RuntimeError("what was said")
    return PlainTextResponse("what was said", 202)


async def listen(socket: WebSocket) -> None:
    socket.state.account = "phone"
    await socket.accept()
    await socket.close()


def client(log: AuditLog) -> TestClient:
    app = Starlette(
        routes=[
            Route("/patients/{patient_id}/transcribe", transcribe, methods=["POST"]),
            Route("/health", lambda _: PlainTextResponse("ok")),
            WebSocketRoute("/listen", listen),
        ]
    )
    app.add_middleware(Audited, log=log)
    return TestClient(app, raise_server_exceptions=False)


def test_each_request_is_recorded_without_what_it_carried(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    asking = client(log)
    asking.post("/patients/anna/transcribe?phrases=secret", content=b"sound")
    asking.post("/patients/anna/transcribe?broken=1")
    asking.get("/secret-path")
    asking.get("/patients/anna/transcribe")
    asking.get("/health")
    with asking.websocket_connect("/listen"):
        pass
    log.close()
    kept = rows(tmp_path / "audit.jsonl")
    route = "/patients/{patient_id}/transcribe"
    assert [(row["action"], row["status"], row["account"]) for row in kept] == [
        (f"POST {route}", 202, "phone"),
        (f"POST {route}", 500, "phone"),
        ("GET other", 404, None),
        (f"GET {route}", 405, None),
        ("WEBSOCKET /listen", 101, "phone"),
    ]
    assert (kept[0]["patient"], kept[0]["audio_seconds"]) == ("anna", 2.5)
    text = (tmp_path / "audit.jsonl").read_text(encoding="utf-8")
    assert "secret" not in text and "said" not in text


def test_a_client_that_goes_away_is_recorded_too(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")

    async def never(_scope: Any, _receive: Any, _send: Any) -> None:
        await asyncio.sleep(60)

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "path": "/transcribe", "state": {"account": "phone"}}
        task = asyncio.create_task(Audited(never, log)(scope, never, never))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    log.close()
    assert [row["account"] for row in rows(tmp_path / "audit.jsonl")] == ["phone"]
