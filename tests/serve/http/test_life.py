"""The service from its start to its end: what it says while the model loads, when it is stuck, and when it is told to stop."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

from resonance.cli import run
from resonance.config_serve import ServeConfig
from resonance.serve.asking import unless_gone
from resonance.serve.decode_pool import audio_decoder
from resonance.serve.faults import ServiceError
from resonance.serve.metrics import Metrics
from resonance.serve.service import Service


def service(config: ServeConfig, load: Callable[[], Any]) -> Service:
    return Service(config, None, None, audio_decoder(config), Metrics(), load=load)


def refused(address: str, path: str, status: str) -> None:
    answer = httpx2.get(address + path)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == status, answer.text
    assert answer.json()["error"]["message"] and int(answer.headers["Retry-After"]) >= 1


def test_while_the_model_loads_health_says_so_and_afterwards_that_all_is_well(
    running: Any, start: Callable[..., Any], recording: bytes, tmp_path: Path
) -> None:
    from resonance.transcribe.mixed_engine import load_mixed

    may_load = threading.Event()

    def load() -> Any:
        assert may_load.wait(60)
        return load_mixed(running.config.model, device="cpu"), None

    page = "https://example.net"
    config = running.config.model_copy(
        update={
            "adapters": None,
            "auth": "off",
            "audit_log": tmp_path / "audit",
            "cors_origins": [page],
            "max_beams": 3,
        }
    )
    found = start(config, {}, wait=False, service=service(config, load))
    address = found.running.address
    try:
        for path in ("/health", "/ready", "/patients"):
            refused(address, path, "loading")
        answer = httpx2.post(address + "/transcribe", files={"file": recording})
        assert answer.status_code == 503 and answer.headers["Retry-After"].isdigit()
        may_load.set()
        until = time.monotonic() + 60
        while httpx2.get(address + "/health").status_code != 200 and time.monotonic() < until:
            time.sleep(0.05)
        assert httpx2.get(address + "/health").json() == httpx2.get(address + "/ready").json() == {"status": "ok"}
        assert httpx2.get(address + "/patients").json()["error"]["code"] == "no_adapters"
        assert '"maximum":3' in httpx2.get(address + "/openapi.json").text
        # Without tokens, no page of another site may use it but those that are named.
        asked = {"Origin": page, "Access-Control-Request-Method": "POST"}
        assert httpx2.options(address + "/transcribe", headers=asked).headers["Access-Control-Allow-Origin"] == page
        foreign = httpx2.get(address + "/v1/models", headers={"Origin": "https://example.org"})
        assert foreign.status_code == 403 and foreign.json()["error"]["code"] == "foreign_page"
        assert "Access-Control-Allow-Origin" not in foreign.headers
    finally:
        may_load.set()
        found.stop()


def test_recordings_are_kept_where_the_operator_wants_that_and_nowhere_else(
    running: Any, start: Callable[..., Any], recording: bytes, spoken: Any, tmp_path: Path
) -> None:
    from websockets.sync.client import connect

    kept = {"keep_audio": tmp_path / "kept", "keep_audio_days": 1.0, "audit_log": tmp_path / "audit"}
    found = start(running.config.model_copy(update=kept), running.tokens)
    try:
        with found.running.client() as client:
            answer = client.post("/transcribe", files={"file": recording}, data={"patient_id": "anna"})
            assert answer.status_code == 200
        headers = {"Authorization": f"Bearer {running.tokens['admin']}"}
        with connect(found.running.address.replace("http", "ws") + "/listen", additional_headers=headers) as socket:
            socket.send(json.dumps({"type": "start", "patient_id": "anna"}))
            for part in np.split(spoken[:30_000], 10):
                socket.send((part * 32767).astype("<i2").tobytes())
                time.sleep(0.02)
            socket.send('{"type": "end"}')
            while json.loads(socket.recv(timeout=60))["type"] != "done":
                pass
    finally:
        found.stop()
    # Of what was spoken, the whole utterance, and none of the beginnings that partial texts were made of.
    rows = [json.loads(path.read_text()) for path in (tmp_path / "kept").rglob("*.json")]
    assert sorted(row["duration"] for row in rows) == pytest.approx([1.875, 1.942])
    assert all(row["speaker"] == "anna" and row["fingerprint"] for row in rows)
    assert answer.json()["text"] in [row["text"] for row in rows]


def test_health_and_ready_say_no_while_the_model_does_not_come_back(
    running: Any, start: Callable[..., Any], recording: bytes, tmp_path: Path
) -> None:
    from resonance.transcribe.mixed_engine import load_mixed

    stuck, released = threading.Event(), threading.Event()

    def load() -> Any:
        engine = load_mixed(running.config.model, device="cpu")
        heard = type(engine).transcribe

        class Stuck(type(engine)):  # type: ignore[misc]
            __slots__ = ()

            def transcribe(self, rows: Any) -> Any:
                if stuck.is_set():
                    released.wait(60)
                return heard(self, rows)

        engine.__class__ = Stuck
        return engine, None

    config = running.config.model_copy(
        update={
            "adapters": None,
            "auth": "off",
            "deadline_seconds": 0.5,
            "ready_seconds": 0.5,
            "drain_seconds": 1,
            "audit_log": tmp_path / "audit",
        }
    )
    found = start(config, {}, service=service(config, load))
    address = found.running.address
    try:
        assert httpx2.get(address + "/health").status_code == 200
        stuck.set()
        late = httpx2.post(address + "/transcribe", files={"file": recording}, timeout=60)
        assert late.status_code in (503, 504), late.text
        until = time.monotonic() + 30
        while httpx2.get(address + "/health").status_code == 200 and time.monotonic() < until:
            time.sleep(0.05)
        refused(address, "/health", "broken")
        assert httpx2.get(address + "/ready").status_code == 503
        released.set()
        stuck.clear()
        while httpx2.get(address + "/health").status_code != 200 and time.monotonic() < until:
            time.sleep(0.05)
        assert httpx2.get(address + "/health").json() == {"status": "ok"}
    finally:
        released.set()
        found.stop()


def test_what_a_client_asked_for_that_has_gone_is_not_computed() -> None:
    ended: list[str] = []

    class Gone:
        async def receive(self) -> dict[str, str]:
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("cancelled")

    with pytest.raises(ServiceError) as caught:
        asyncio.run(unless_gone(Gone(), work()))  # type: ignore[arg-type]
    assert caught.value.status == 499 and ended == ["cancelled"]


# --- the command ---


class Command:
    """`resonance serve` in a process of its own."""

    def __init__(self, place: Path, *flags: str) -> None:
        self.place = place
        self.out = (place / "out").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "resonance", "serve", "--port", "0", "--auth", "off", "--device", "cpu", *flags],
            stdout=self.out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"RESONANCE_HOME": str(place / "home")},
        )

    @property
    def said(self) -> str:
        return (self.place / "out").read_text()

    def until(self, pattern: str) -> str:
        """Wait until this was said. Returns the first group."""
        until = time.monotonic() + 120
        while not (found := re.search(pattern, self.said)):
            assert time.monotonic() < until and self.process.poll() is None, self.said
            time.sleep(0.05)
        return found[1] if found.groups() else found[0]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    made: list[Command] = []

    def begin(*flags: str) -> Command:
        made.append(Command(tmp_path, *flags))
        return made[-1]

    yield begin
    for one in made:
        one.process.kill()
        one.process.wait()
        one.out.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_the_command_says_where_it_listens_and_answers_what_is_under_way_before_it_stops(
    command: Callable[..., Command], openai_shaped: Path, recording: bytes
) -> None:
    serving = command("--model", str(openai_shaped), "--temperature_increment_on_fallback", "0")
    address = serving.until(r"Listening on (http://127\.0\.0\.1:\d+)\.")
    serving.until("Ready.")
    for wanted in (
        str(openai_shaped),
        "Adapters: none",
        "Open to everybody",
        f"file=@recording.wav {address}/transcribe",
    ):
        assert wanted in serving.said
    answers: list[int] = []

    def ask() -> None:
        body = {"file": ("a.wav", recording)}
        with httpx2.Client(timeout=60) as client:
            answers.append(client.post(f"{address}/transcribe", files=body, data={"timestamps": "word"}).status_code)

    askers = [threading.Thread(target=ask) for _i in range(4)]
    for asker in askers:
        asker.start()
    until = time.monotonic() + 30
    while serving.process.poll() is None and time.monotonic() < until:
        if (
            'route="/transcribe"' in (text := httpx2.get(f"{address}/metrics").text)
            or "queued_audio_seconds 0.0" not in text
        ):
            break
    serving.process.send_signal(signal.SIGTERM)
    assert serving.process.wait(60) == 0, serving.said
    for asker in askers:
        asker.join()
    assert answers == [200] * 4
    assert "answered first" in serving.said and "Traceback" not in serving.said


def test_a_model_that_cannot_be_loaded_ends_the_command_with_its_reason(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["serve", "--model", str(tmp_path / "empty"), "--port", "0", "--auth", "off"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and "empty" in said and "Traceback" not in said


def test_a_port_that_is_taken_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run(["serve", "--model", "m", "--port", str(port), "--auth", "off"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"Error: Port {port} of 127.0.0.1 is taken") and said.count("\n") == 1


def test_a_public_address_without_tokens_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--model", "m", "--host", "0.0.0.0", "--no_auth"]) == 2
    assert "--insecure" in capsys.readouterr().err


def test_small_answers_are_sent_at_once(client: httpx2.Client) -> None:
    # Held back until the client confirms the headers, each takes 40 ms.
    times = []
    for _i in range(20):
        begun = time.perf_counter()
        client.get("/health")
        times.append(time.perf_counter() - begun)
    assert sorted(times)[5] < 0.03


def test_an_address_that_is_not_this_machines_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--model", "m", "--host", "192.0.2.1", "--port", "1"]) == 1
    assert "192.0.2.1" in capsys.readouterr().err
