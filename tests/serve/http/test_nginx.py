"""deploy/nginx.conf in a real nginx before the real service. Skipped where there is no nginx."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest

CONFIG = Path(__file__).resolve().parents[3] / "deploy" / "nginx.conf"
NAME = "voice.example.org"


@dataclass(frozen=True)
class Proxy:
    port: int
    plain_port: int
    folder: Path
    trust: ssl.SSLContext
    said: str  # by `nginx -t`

    def client(self, token: str) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {token}"}
        return httpx2.Client(base_url=f"https://{NAME}:{self.port}", headers=headers, verify=self.trust, timeout=60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def nginx_before(service: str, folder: Path) -> Iterator[Proxy]:
    """nginx with our file in front of a service, host:port."""
    program = os.environ.get("RESONANCE_NGINX") or shutil.which("nginx")
    if not program or not shutil.which("openssl"):
        pytest.skip("no nginx here (or no openssl for its certificate)")
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={NAME}"]
    certificate += ["-addext", f"subjectAltName=DNS:{NAME}", "-keyout", "privkey.pem", "-out", "fullchain.pem"]
    subprocess.run(certificate, cwd=folder, check=True, capture_output=True)
    port, plain_port = free_port(), free_port()
    site = CONFIG.read_text(encoding="utf-8").replace("    listen [::]:", "    # ")
    for old, new in (
        ("listen 80;", f"listen 127.0.0.1:{plain_port};"),
        ("listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        ("resonance:8000", service),
        ("/etc/nginx/certs", str(folder)),
        ("/var/log/nginx", str(folder)),
    ):
        assert old in site
        site = site.replace(old, new)
    (folder / "site.conf").write_text(site, encoding="utf-8")
    places = "".join(
        f"{name}_temp_path {folder}/{name}; " for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/pid; error_log {folder}/error.log; events {{}} "
        f"http {{ access_log off; {places} include {folder}/site.conf; }}",
        encoding="utf-8",
    )
    command = [program, "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    tried = subprocess.run([*command, "-t"], capture_output=True, text=True)
    process = subprocess.Popen(command)
    trust = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
    until = time.monotonic() + 20
    while True:
        assert process.poll() is None and time.monotonic() < until, (folder / "error.log").read_text()
        with socket.socket() as trying:
            if trying.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    try:
        yield Proxy(port, plain_port, folder, trust, tried.stderr)
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def proxy(running: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with nginx_before(running.address.removeprefix("http://"), tmp_path_factory.mktemp("nginx")) as found:
        yield found


@pytest.fixture(autouse=True)
def name_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate's name leads to this machine."""
    real = socket.getaddrinfo

    def found(host: Any, *given: Any, **more: Any) -> Any:
        return real("127.0.0.1" if host in (NAME, NAME.encode()) else host, *given, **more)

    monkeypatch.setattr(socket, "getaddrinfo", found)


def test_recordings_and_events_go_through_tls(running: Any, proxy: Proxy, recording: bytes) -> None:
    files = {"file": ("a.wav", recording)}
    with proxy.client(running.tokens["anna"]) as client:
        answer = client.post("/transcribe", files=files)
        assert answer.status_code == 200 and answer.json()["adapter"]["patient_id"] == "anna"
        assert answer.headers["Strict-Transport-Security"]
        streamed = client.post("/v1/audio/transcriptions", data={"model": "anna", "stream": "true"}, files=files)
        assert "transcript.text.done" in streamed.text
        assert client.get("/health").json() == {"status": "ok"}


def test_what_is_too_large_is_refused_in_the_one_shape(running: Any, proxy: Proxy) -> None:
    """By the service, whose limit is the lower one."""
    with proxy.client(running.tokens["all"]) as client:
        large = client.post("/transcribe", files={"file": ("a.wav", bytes(3_000_000))})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "upload_too_large")


def test_nginx_reads_the_file_without_a_warning(proxy: Proxy) -> None:
    assert "test is successful" in proxy.said
    assert "[warn]" not in proxy.said and "[emerg]" not in proxy.said, proxy.said


def test_what_nginx_refuses_itself_has_the_one_shape(running: Any, proxy: Proxy) -> None:
    connection = http.client.HTTPSConnection(NAME, proxy.port, context=proxy.trust, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest("POST", "/transcribe")
        connection.putheader("Authorization", f"Bearer {running.tokens['anna']}")
        connection.putheader("Content-Length", "200000000")
        connection.endheaders()
        answer = connection.getresponse()
        said = json.loads(answer.read())["error"]
    assert (answer.status, answer.headers["Content-Type"]) == (413, "application/json")
    assert said["code"] == "upload_too_large" and {*said} == {"message", "type", "param", "code", "hint"}


def test_a_service_that_is_away_is_told_in_the_one_shape_with_a_time_to_ask_again(tmp_path: Path) -> None:
    with nginx_before(f"127.0.0.1:{free_port()}", tmp_path) as proxy, proxy.client("token") as client:
        answer = client.post("/transcribe", files={"file": ("a.wav", bytes(100_000))})
    said = answer.json()["error"]
    assert (answer.status_code, said["code"], answer.headers["Retry-After"]) == (503, "not_ready", "5")
    assert {*said} == {"message", "type", "param", "code", "hint"} and answer.headers["Strict-Transport-Security"]


def test_figures_are_not_for_the_world(running: Any, proxy: Proxy) -> None:
    with proxy.client(running.tokens["admin"]) as client:
        assert client.get("/metrics").status_code == 404
        assert client.get("/patients").status_code == 200


def test_without_tls_one_is_sent_to_it(proxy: Proxy) -> None:
    answer = httpx2.get(f"http://127.0.0.1:{proxy.plain_port}/health", headers={"Host": NAME})
    assert (answer.status_code, answer.headers["Location"]) == (301, f"https://{NAME}/health")


def test_a_microphone_goes_through(running: Any, proxy: Proxy, spoken: np.ndarray) -> None:
    import websockets

    async def speak() -> dict[str, Any]:
        address = f"wss://{NAME}:{proxy.port}/listen"
        async with websockets.connect(address, ssl=proxy.trust) as connection:
            await connection.send(json.dumps({"type": "start", "token": running.tokens["anna"]}))
            await connection.send((spoken * 32767).astype("<i2").tobytes())
            await connection.send('{"type": "end"}')
            messages = [json.loads(message) async for message in connection]
        found: dict[str, Any] = messages[-1]
        return found

    assert asyncio.run(speak())["type"] == "done"


def test_nothing_of_it_is_left_on_disk(running: Any, proxy: Proxy, recording: bytes) -> None:
    with proxy.client(running.tokens["anna"]) as client:
        client.post("/transcribe?note=secret", files={"file": ("a.wav", recording)})
    log = (proxy.folder / "access.log").read_text(encoding="utf-8")
    assert "POST /transcribe" in log and "secret" not in log and running.tokens["anna"] not in log
    assert not [path for path in proxy.folder.glob("*/*") if path.is_file()]  # of bodies and answers
