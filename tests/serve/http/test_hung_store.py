"""A place of adapters that hangs: who needs nothing of it is answered, who does is told, and the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from resonance.serve import threads
from resonance.serve.faults import ServiceError
from resonance.serve.keeping import KEEP_SECONDS

pytestmark = pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
STORE_SECONDS = 2.0
SLACK = 5.0  # of a machine that does something else


def hang(root: Path, patient: str) -> None:
    """Reading which version of this person answers waits for a writer who never comes, as NFS waits for its server."""
    current = root / patient / "current"
    current.parent.mkdir(exist_ok=True)
    current.unlink(missing_ok=True)
    os.mkfifo(current)


def let_go(root: Path) -> None:
    """End all readings."""
    for pipe in root.glob("*/current"):
        while pipe.is_fifo():
            with contextlib.suppress(OSError):  # nobody reads
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                continue
            break


@pytest.fixture
def root(running: Any, tmp_path: Path) -> Iterator[Path]:
    found = tmp_path / "adapters"
    shutil.copytree(running.config.adapters / "anna", found / "anna")
    shutil.copytree(running.config.adapters / "bob", found / "bob")
    yield found
    let_go(found)


@pytest.fixture
def patient(running: Any, start: Callable[..., Any], root: Path, tmp_path: Path) -> Iterator[Any]:
    """A service over `root` that waits for it for a while."""
    config = running.config.model_copy(
        update={"adapters": root, "store_seconds": STORE_SECONDS, "audit_log": tmp_path / "audit"}
    )
    found = start(config, running.tokens)
    yield found.running
    let_go(root)
    found.stop()


def ask(running: Any, recording: bytes, **data: str) -> httpx2.Response:
    with running.client("admin") as client:
        return client.post("/transcribe", files={"file": recording}, data=data)


def reading() -> int:
    """Threads that wait for an adapter."""
    return sum(thread.name.startswith("resonance-read") for thread in threading.enumerate())


def unreachable(answer: httpx2.Response) -> bool:
    found = answer.status_code == 503 and answer.json()["error"]["code"] == "adapter_store_unreachable"
    return found and int(answer.headers["Retry-After"]) >= 1


def test_while_every_reading_hangs_only_those_are_refused_who_need_one(
    patient: Any, root: Path, recording: bytes
) -> None:
    assert ask(patient, recording, patient_id="anna").status_code == 200
    hung = [f"hung{number}" for number in range(threads.READERS + 8)]
    for name in (*hung, "anna"):
        hang(root, name)
    with ThreadPoolExecutor(len(hung)) as pool:
        asked = [pool.submit(ask, patient, recording, patient_id=name) for name in hung]
        while reading() < threads.READERS:
            assert not asked[0].done() or unreachable(asked[0].result())
            time.sleep(0.01)
        begun = time.monotonic()
        # Her adapter is in memory, and nobody can say whether there is a newer one.
        for _again in range(2):
            answer = ask(patient, recording, patient_id="anna")
            assert answer.status_code == 200 and answer.json()["adapter"]["patient_id"] == "anna"
        assert ask(patient, recording).json()["adapter"] is None
        with patient.client(None) as client:
            assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert time.monotonic() - begun < STORE_SECONDS + SLACK
        assert all(unreachable(one.result()) for one in asked)
    assert unreachable(ask(patient, recording, patient_id="bob"))  # there is no thread left to read with
    let_go(root)
    ends = time.monotonic() + 30
    while ask(patient, recording, patient_id="bob").status_code != 200:
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_one_hung_reading_takes_one_thread_however_often_it_is_asked_for(
    patient: Any, root: Path, recording: bytes
) -> None:
    hang(root, "hung")
    before = reading()
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _i: ask(patient, recording, patient_id="hung"), range(12)))
    assert all(map(unreachable, answers)) and reading() <= before + 1
    assert ask(patient, recording, patient_id="bob").status_code == 200


def test_lists_that_hang_are_refused_and_nothing_else_is(patient: Any, root: Path, recording: bytes) -> None:
    hang(root, "hung")
    with patient.client("admin") as client:
        for path in ("/patients/hung/adapter", "/v1/models/hung", "/v1/models"):
            begun = time.monotonic()
            assert unreachable(client.get(path)), path
            assert time.monotonic() - begun < STORE_SECONDS + SLACK
        with ThreadPoolExecutor(2 * threads.LISTERS) as pool:
            asked = list(pool.map(lambda _i: client.get("/patients/hung/adapter"), range(2 * threads.LISTERS)))
        assert all(map(unreachable, asked))
        assert client.get("/health").status_code == 200
    assert ask(patient, recording, patient_id="anna").status_code == 200
    assert ask(patient, recording, patient_id="bob").status_code == 200


def test_what_waits_beyond_a_bound_is_refused_at_once() -> None:
    never = threading.Event()
    few = threads.Daemons(2, "resonance-test", most_waiting=3)
    try:
        waiting = [few.submit(never.wait) for _i in range(5)]
        with pytest.raises(threads.BusyError):
            few.submit(never.wait)
        never.set()
        assert all(one.result(10) for one in waiting)
        assert few.submit(lambda: 1).result(10) == 1
    finally:
        never.set()
        few.close()


def test_changes_of_adapters_that_hang_are_given_up_at_the_deadline(running: Any, root: Path) -> None:
    hang(root, "hung")

    async def main() -> None:
        from resonance.serve.service import create_service

        service = create_service(running.config.model_copy(update={"adapters": root, "deadline_seconds": 0.5}))
        await service.start()
        assert (await service.loaded()).status == "ready"
        try:
            with pytest.raises(ServiceError) as caught:
                await service.roll_back("hung")
            assert caught.value.code == "deadline_passed"
        finally:
            await service.drain(0)

    asyncio.run(main())


@pytest.fixture
def serving(running: Any, root: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], str]]]:
    """`resonance serve` in a process of its own, and its address."""
    made: list[subprocess.Popen[bytes]] = []

    def begin(*flags: str, program: Sequence[str] = ("-m", "resonance")) -> tuple[subprocess.Popen[bytes], str]:
        out = tmp_path / "out"
        command = [sys.executable, *program, "serve", "--model", running.config.model, "--adapters", str(root)]
        command += ["--port", "0", "--auth", "off", "--device", "cpu", *flags]
        with out.open("wb") as stream:
            made.append(
                subprocess.Popen(
                    command,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"RESONANCE_HOME": str(tmp_path / "home")},
                )
            )
        ends = time.monotonic() + 120
        while "Ready." not in (said := out.read_text()):
            assert time.monotonic() < ends and made[-1].poll() is None, said
            time.sleep(0.05)
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found
        return made[-1], found[0]

    yield begin
    for one in made:
        one.kill()
        one.wait()


def ended(process: subprocess.Popen[bytes]) -> tuple[int, float]:
    """Its exit code after SIGTERM, and how long it took."""
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    return process.wait(60), time.monotonic() - begun


def test_readings_that_never_return_do_not_keep_the_process(
    serving: Callable[..., tuple[subprocess.Popen[bytes], str]], root: Path, recording: bytes
) -> None:
    hang(root, "hung")
    process, address = serving("--store_seconds", "0.5", "--drain_seconds", "10")
    for path in ("/patients/hung/adapter", "/v1/models/hung"):
        assert unreachable(httpx2.get(address + path, timeout=60))
    answer = httpx2.post(address + "/transcribe", files={"file": recording}, data={"patient_id": "hung"}, timeout=60)
    assert unreachable(answer)
    code, seconds = ended(process)
    assert code == 0 and seconds < 5 + SLACK


def test_a_request_that_waits_for_such_a_reading_is_told_that_the_service_stops(
    serving: Callable[..., tuple[subprocess.Popen[bytes], str]], root: Path
) -> None:
    hang(root, "hung")
    process, address = serving("--store_seconds", "100", "--drain_seconds", "1")
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=60) as connection:
        connection.sendall(b"GET /patients/hung/adapter HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        time.sleep(0.5)
        code, seconds = ended(process)
        assert b'"draining"' in connection.recv(65536) + connection.recv(65536)
    assert code == 128 + signal.SIGTERM and seconds < 1 + 5 + SLACK


# No disk hangs when a test wants it; this is what the thread that writes to one sees of it.
HANGING_DISK = """
import threading
from resonance.serve import keep_audio
def write_wav(path, samples):
    print("hangs", flush=True)
    threading.Event().wait()
keep_audio.write_wav = write_wav
from resonance.__main__ import main
main()
"""


def test_a_disk_for_recordings_that_hangs_keeps_neither_a_transcript_nor_the_process(
    serving: Callable[..., tuple[subprocess.Popen[bytes], str]], recording: bytes, tmp_path: Path
) -> None:
    flags = ("--keep_audio", str(tmp_path / "kept"), "--keep_audio_days", "1", "--drain_seconds", "30")
    process, address = serving(*flags, program=("-c", HANGING_DISK))
    out = tmp_path / "out"
    post = functools.partial(httpx2.post, address + "/transcribe", files={"file": recording}, timeout=60)
    assert post().status_code == 200
    assert "could not be kept" in out.read_text()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post)
        ends = time.monotonic() + 60
        while out.read_text().count("hangs") < 2:
            assert time.monotonic() < ends and not waiting.done()
            time.sleep(0.01)
        code, seconds = ended(process)
        assert waiting.result().status_code == 200  # who has been heard gets the transcript
    assert code in (0, 128 + signal.SIGTERM) and seconds < KEEP_SECONDS + SLACK
