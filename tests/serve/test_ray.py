"""`resonance serve --engine ray`, for real: Ray on this machine, two copies of a small model, adapters of eight people."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from resonance.data.audio import read_audio
from resonance.demo import SPEAKER
from resonance.serve import ray_app
from resonance.serve.faults import ServiceError
from resonance.serve.tokens import TokenFile
from resonance.transcribe.mixed_engine import load_mixed

sys.path.insert(0, str(Path(__file__).parent))
from serving import request, running, service_of

CLIP = SPEAKER / "audio" / "close_the_door_1.opus"
PEOPLE = [f"p{i}" for i in range(8)]
COPIES = 2
START_SECONDS = 180.0
SAID = re.compile(r'resonance_(\w+)\{[^}]*copy="(\w+)"[^}]*\} (\S+)')


@dataclass
class Cluster:
    """The service while it runs."""

    process: subprocess.Popen[str]
    http: httpx.Client
    address: str
    adapters: Path
    clip: bytes
    others: set[Path]  # folders of Ray that were there before

    def ask(self, person: str | None, **form: str) -> httpx.Response:
        form = {"skip_nonspeech": "false", **form} | ({"patient_id": person} if person else {})
        return self.http.post("/transcribe", data=form, files={"file": ("a.opus", self.clip)})

    def copies(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "ServeReplica:resonance:models" in title(child)]

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process(self.process.pid)
        return [own, *own.children(recursive=True)]

    def figures(self, name: str) -> dict[str, float]:
        """A figure of each copy."""
        found: dict[str, float] = {}
        for figure, copy, value in SAID.findall(self.http.get("/metrics").text):
            if figure == name:
                found[copy] = found.get(copy, 0.0) + float(value)
        return found

    def wait(self, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        until = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < until, "it did not come"
            time.sleep(0.3)
        return found


def title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def fingerprint(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def cluster(
    openai_shaped: Path, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    pytest.importorskip("ray.serve", reason='Ray is not installed: pip install "resonance-asr[ray]"')
    folder = tmp_path_factory.mktemp("ray")
    for i, person in enumerate(PEOPLE):
        make_adapter(folder / "adapters" / person, base=openai_shaped, seed=i, rank=2 + 2 * (i % 3))
    _token, secret = TokenFile(folder / "tokens.json").create("all", "admin")
    command = [sys.executable, "-m", "resonance", "serve", "--model", str(openai_shaped), "--engine", "ray"]
    command += ["--adapters", "adapters", "--tokens", "tokens.json", "--port", "0"]  # as from the command line
    command += [f"--min_replicas={COPIES}", f"--max_replicas={COPIES}", "--requests_per_minute=100000"]
    command += ["--temperature_increment_on_fallback=0", "--device=cpu", "--refresh_seconds=600", "--drain_seconds=5"]
    command += ["--max_upload_mb=2", "--batch_size=4"]
    environment = {**os.environ, "RAY_ADDRESS": "", "RESONANCE_LANG": "en"}
    places = (ray_app.SHARED_MEMORY, Path(tempfile.gettempdir()))
    others = {found for place in places for found in place.glob("resonance-ray-*")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    assert process.stdout is not None
    try:
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ready"):
                break
        found = re.search(r"http://127\.0\.0\.1:\d+", "".join(lines))
        assert found, "".join(lines) + (folder / "log").read_text()[-3000:]
        with httpx.Client(base_url=found[0], headers={"Authorization": f"Bearer {secret}"}, timeout=120) as http:
            started = Cluster(process, http, found[0], folder / "adapters", CLIP.read_bytes(), others)
            started.wait(lambda: http.get("/health").status_code == 200)
            yield started
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        if process.poll() is None:
            process.kill()
        process.stdout.close()


def test_people_in_parallel_are_each_answered_by_their_own_adapter(cluster: Cluster) -> None:
    alone = {person: cluster.ask(person).json()["text"] for person in PEOPLE}
    assert len({*alone.values()}) > 2  # so that a wrong adapter would be heard
    asked = PEOPLE * 5
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(cluster.ask, asked))
    for person, answer in zip(asked, answers, strict=True):
        said = answer.json()
        assert answer.status_code == 200 and said["text"] == alone[person]
        assert said["adapter"]["patient_id"] == person
        assert said["adapter"]["fingerprint"] == fingerprint(cluster.adapters / person)
    assert cluster.ask(None).json()["adapter"] is None


def test_a_person_goes_where_their_adapter_is(cluster: Cluster) -> None:
    def windows() -> dict[str, float]:
        found = cluster.figures("windows_total")
        return found if len(found) == COPIES else {}

    cluster.ask("p0")
    time.sleep(6)  # until the front has asked for figures again
    before = cluster.wait(windows)
    for _ in range(12):
        cluster.ask("p0")
    after = cluster.wait(lambda: (now := windows()) and sum(now.values()) >= sum(before.values()) + 12 and now)
    assert sorted(after[copy] - before[copy] for copy in after) == [0, 12]


def test_refusals_formats_and_events_are_those_of_one_process(cluster: Cluster) -> None:
    missing = cluster.ask("nobody")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "adapter_not_found")
    assert missing.headers.get_list("x-request-id") == [missing.headers["x-request-id"]]
    damaged = cluster.http.post("/transcribe", files={"file": ("a.opus", b"no sound" * 99)})
    assert (damaged.status_code, damaged.json()["error"]["code"]) == (400, "audio_unreadable")
    wrong = cluster.ask("p1", language="klingon")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "language")
    english = cluster.ask("p1", phrases="x" * 200)
    assert english.status_code in (200, 400)
    large = cluster.http.post("/transcribe", files={"file": ("a.wav", bytes(3_000_000))})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "upload_too_large")
    unknown = httpx.post(f"{cluster.address}/transcribe", files={"file": ("a.opus", cluster.clip)})
    assert unknown.status_code == 401

    form = {"model": "p1", "response_format": "verbose_json"}
    route = "/v1/audio/transcriptions"
    verbose = cluster.http.post(route, data=form, files={"file": ("a.opus", cluster.clip)}).json()
    assert verbose["segments"][0]["tokens"] and verbose["resonance"]["adapter"]["patient_id"] == "p1"
    streamed = cluster.http.post(
        route, data={"model": "p1", "stream": "true"}, files={"file": ("a.opus", cluster.clip)}
    )
    events = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
    assert events[-1]["type"] == "transcript.text.done" and events[-1]["text"] == verbose["text"]
    assert "p1" in [model["id"] for model in cluster.http.get("/v1/models").json()["data"]]
    assert cluster.http.get("/ready").status_code == 200


def test_a_client_that_leaves_is_taken_out_of_the_copy(cluster: Cluster) -> None:
    time.sleep(6)  # until the front has asked for figures again
    before = sum(cluster.figures("dropped_windows_total").values())
    for i in range(40):  # some leave while it is read, some before it is decoded, and some get their answer
        with contextlib.suppress(httpx.TimeoutException):
            slow = {"num_beams": "5", "skip_nonspeech": "false", "patient_id": "p5"}
            cluster.http.post(
                "/transcribe", data=slow, files={"file": ("a.opus", cluster.clip)}, timeout=0.03 * (1 + i % 10)
            )
    cluster.wait(lambda: sum(cluster.figures("dropped_windows_total").values()) > before)
    assert not cluster.figures("failed_windows_total") or not sum(cluster.figures("failed_windows_total").values())
    assert cluster.ask("p5").status_code == 200


def test_more_than_the_copies_take_is_refused_and_they_stay_healthy(cluster: Cluster) -> None:
    with ThreadPoolExecutor(140) as pool:
        asked = [pool.submit(cluster.ask, PEOPLE[i % 8]) for i in range(140)]
        health = [cluster.http.get("/health").status_code for _ in range(5)]
        answers = [one.result() for one in asked]
    assert {*health} == {200}
    assert {answer.status_code for answer in answers} == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1 and refused.json()["error"]["code"] == "too_busy"
    assert cluster.http.get("/ready").status_code == 200


@pytest.mark.skipif(not ray_app.SHARED_MEMORY.is_dir(), reason="no folder in shared memory here")
def test_what_ray_has_no_room_for_stays_in_memory(cluster: Cluster) -> None:
    started = psutil.Process(cluster.process.pid).children(recursive=True)
    (raylet,) = (words for process in started if "raylet/raylet" in (words := title(process)))
    places = re.findall(r"--(?:plasma|fallback)_directory=(\S+)", raylet)
    assert len(places) == 2 and all(place.startswith("/dev/shm") for place in places)


def test_nobody_else_is_let_into_ray(cluster: Cluster) -> None:
    """Who is could run programs here. The ports between front and copies are open to all networks: they ask for the token."""
    import grpc

    local, open_to_all = set[int](), set[int]()
    for process in cluster.processes():
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                address = connection.laddr.ip.removeprefix("::ffff:")
                (local if address in ("127.0.0.1", "::1") else open_to_all).add(connection.laddr.port)
                assert address in ("127.0.0.1", "::1") or "ServeReplica" in title(process), title(process)
    assert len(local) > 5 and len(open_to_all) == COPIES + 1
    for port in open_to_all:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"", timeout=10)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.skipif(not ray_app.SHARED_MEMORY.is_dir(), reason="Ray's own folder is used here")
def test_ray_s_figures_name_nobody_and_its_logs_are_for_this_user_alone(cluster: Cluster) -> None:
    for person in PEOPLE:
        assert cluster.ask(person).status_code == 200
    (agent,) = (process for process in cluster.processes() if "DashboardAgent" in title(process))
    ports = {each.laddr.port for each in agent.net_connections("inet") if each.status == psutil.CONN_LISTEN}

    def figures() -> str:
        found = ""
        for port in ports:
            with contextlib.suppress(httpx.HTTPError):
                found += httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
        return found if 'model_id="' in found else ""

    text = cluster.wait(figures)
    models = set(re.findall(r'model_id="([^"]*)"', text))
    assert models and all(re.fullmatch("[0-9a-f]{24}", model) for model in models)
    (raylet,) = (words for process in cluster.processes() if "raylet/raylet" in (words := title(process)))
    found = re.search(r"--temp_dir=(\S+)", raylet) or re.search(r"--temp-dir=(\S+)", raylet)
    assert found, raylet
    assert Path(found[1]).parent.stat().st_mode & 0o077 == 0


def test_a_microphone_is_heard_through_ray(cluster: Cluster) -> None:
    import websockets

    samples = (read_audio(CLIP) * 32767).astype("<i2")
    token = cluster.http.headers["Authorization"].removeprefix("Bearer ")

    async def speak() -> list[dict[str, Any]]:
        async with websockets.connect(cluster.address.replace("http", "ws") + "/listen") as socket:
            await socket.send(json.dumps({"type": "start", "token": token, "patient_id": "p2"}))
            for at in range(0, len(samples), 3200):
                await socket.send(samples[at : at + 3200].tobytes())
            await socket.send(json.dumps({"type": "end"}))
            return [json.loads(message) async for message in socket]

    messages = asyncio.run(speak())
    assert messages[0]["type"] == "ready" and messages[-1]["type"] == "done", messages
    assert messages[-1]["duration"] == pytest.approx(len(samples) / 16_000, abs=0.05)


def test_a_new_adapter_answers_in_all_copies_and_an_old_one_after_a_rollback(
    cluster: Cluster, openai_shaped: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """`refresh_seconds` is ten minutes here: the copies are told."""

    def answering() -> set[str]:
        with ThreadPoolExecutor(16) as pool:  # more than one copy is asked
            answers = [answer.json() for answer in pool.map(cluster.ask, ["p3"] * 32)]
        return {answer["adapter"]["fingerprint"] for answer in answers}

    first = fingerprint(cluster.adapters / "p3")
    assert answering() == {first}
    folder = make_adapter(tmp_path / "new", base=openai_shaped, seed=77, rank=8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    put = cluster.http.put("/patients/p3/adapter", files={"file": ("adapter.zip", buffer.getvalue())})
    assert put.status_code == 201 and put.json()["fingerprint"] == fingerprint(folder), put.text
    assert answering() == {fingerprint(folder)}
    back = cluster.http.post("/patients/p3/adapter/rollback", json={})
    assert back.status_code == 200 and answering() == {first}
    assert cluster.http.delete("/patients/p3/adapter").status_code == 200
    assert {cluster.ask("p3").status_code for _ in range(8)} == {404}


def test_an_adapter_of_another_model_is_refused_through_ray(
    cluster: Cluster, tiny_model: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "other", base=tiny_model)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    put = cluster.http.put("/patients/p4/adapter", files={"file": ("adapter.zip", buffer.getvalue())})
    assert (put.status_code, put.json()["error"]["code"]) == (422, "adapter_unusable")
    assert cluster.ask("p4").json()["adapter"]["fingerprint"] == fingerprint(cluster.adapters / "p4")


def test_adapters_that_cannot_be_used_are_refused_as_without_ray(
    cluster: Cluster, openai_shaped: Path, tiny_model: Path, make_adapter: Callable[..., Path]
) -> None:
    make_adapter(cluster.adapters / "foreign", base=tiny_model)
    damaged = make_adapter(cluster.adapters / "damaged", base=openai_shaped) / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    make_adapter(cluster.adapters / "torn", base=openai_shaped)
    (cluster.adapters / "torn" / "current").write_text("../damaged\n")

    async def alone(person: str) -> tuple[int, dict[str, Any]]:
        async with running(service_of(load_mixed(str(openai_shaped), device="cpu"), cluster.adapters)) as service:
            with pytest.raises(ServiceError) as caught:
                await service.transcribe(request(read_audio(CLIP), person))
            return caught.value.status, caught.value.body

    for person in ("foreign", "damaged", "torn"):
        answer = cluster.ask(person)
        assert (answer.status_code, answer.json()) == asyncio.run(alone(person))
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "adapter_unusable")
    for method, place in (("POST", "/rollback"), ("GET", ""), ("DELETE", "")):
        torn = cluster.http.request(method, f"/patients/torn/adapter{place}")
        assert torn.status_code == (200 if method == "DELETE" else 422), torn.text
    back = cluster.http.post("/patients/damaged/adapter/rollback", json={})
    assert (back.status_code, back.json()["error"]["code"]) == (409, "no_older_version")


def test_a_copy_that_is_killed_is_replaced_and_nobody_gets_anything_but_an_answer_or_503(cluster: Cluster) -> None:
    before = {copy.pid for copy in cluster.copies()}
    assert len(before) == COPIES

    def asking(number: int) -> httpx.Response:
        if number == 20:
            os.kill(min(before), signal.SIGKILL)
        return cluster.ask(PEOPLE[number % 3])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(asking, range(80)))
    for answer in answers:
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) >= 1 and answer.json()["error"]["code"] in ("copy_lost", "broken")
    assert sum(answer.status_code == 200 for answer in answers) > 60
    after = cluster.wait(lambda: len(now := {copy.pid for copy in cluster.copies()}) == COPIES and now)
    assert len(after - before) == 1
    cluster.wait(lambda: len(cluster.figures("windows_total")) == COPIES)
    assert {cluster.ask(person).status_code for person in PEOPLE if person != "p3"} == {200}


def test_sigterm_ends_all_of_it(cluster: Cluster) -> None:
    started = psutil.Process(cluster.process.pid).children(recursive=True)
    cluster.process.send_signal(signal.SIGTERM)
    assert cluster.process.wait(60) == 0
    _gone, alive = psutil.wait_procs(started, timeout=20)
    assert not alive, [title(process) for process in alive]
    for folder in (ray_app.SHARED_MEMORY, Path(tempfile.gettempdir())):
        assert not {*folder.glob("resonance-ray-*")} - cluster.others
