"""The real service, with real adapters, on a real socket: one for all tests of this folder."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest
import soundfile

import resonance
from resonance.config_serve import ServeConfig
from resonance.data.audio import read_audio
from resonance.serve.auth import Auth
from resonance.serve.command import Server, bind
from resonance.serve.service import Service, create_service
from resonance.serve.tokens import TokenFile

START_SECONDS = 120.0


@dataclass(frozen=True)
class Running:
    """A service that answers, and who may ask it."""

    address: str  # http://127.0.0.1:port
    config: ServeConfig
    service: Service
    server: Server
    tokens: dict[str, str]  # by name: admin, all, anna, base

    def client(self, token: str | None = "admin") -> httpx2.Client:
        headers = {} if token is None else {"Authorization": f"Bearer {self.tokens.get(token, token)}"}
        return httpx2.Client(base_url=self.address, headers=headers, timeout=60)


@dataclass
class Started:
    running: Running
    thread: threading.Thread

    def stop(self) -> None:
        self.running.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


def started(
    config: ServeConfig, tokens: dict[str, str], *, wait: bool = True, service: Service | None = None
) -> Started:
    """A service as `resonance serve` runs it, in a thread."""
    listening = bind(config)
    service = service or create_service(config)
    with pytest.MonkeyPatch.context() as patch:  # wrong tokens are tried by the hundred
        patch.setattr("resonance.serve.auth.FAILURES_PER_MINUTE", 1_000_000)
        auth = Auth.from_config(config)
    server = Server(service, auth, config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve_on(listening)), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    running = Running(address, config, service, server, tokens)
    until = time.monotonic() + START_SECONDS
    while wait and service.state.status == "loading":
        assert time.monotonic() < until and thread.is_alive()
        time.sleep(0.02)
    return Started(running, thread)


def make_tokens(path: Path) -> dict[str, str]:
    file = TokenFile(path)
    given = {"admin": ("admin", None), "all": ("all", None), "anna": ("patient", "anna"), "base": ("base", None)}
    return {name: file.create(name, scope, patient=patient)[1] for name, (scope, patient) in given.items()}


@pytest.fixture(scope="session")
def running(
    tmp_path_factory: pytest.TempPathFactory, openai_shaped: Path, make_adapter: Callable[..., Path]
) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("serve")
    for seed, (name, rank) in enumerate({"anna": 4, "bob": 8, "whisper-1": 2}.items(), 1):
        make_adapter(place / "adapters" / name, base=openai_shaped, seed=seed, rank=rank)
    config = ServeConfig(
        model=str(openai_shaped),
        adapters=place / "adapters",
        port=0,
        device="cpu",
        tokens=place / "tokens.json",
        requests_per_minute=1_000_000,
        temperature_increment_on_fallback=0,
        audit_log=place / "audit.jsonl",
        max_upload_mb=2,
        max_audio_seconds=60,
        refresh_seconds=0,
        drain_seconds=5,
        ready_seconds=30,
    )
    found = started(config, make_tokens(place / "tokens.json"))
    assert found.running.service.state.status == "ready", found.running.service.state
    yield found.running
    found.stop()


@pytest.fixture
def client(running: Running) -> Iterator[httpx2.Client]:
    """An admin's."""
    with running.client() as client:
        yield client


@pytest.fixture(scope="session")
def speech() -> bytes:
    """Two seconds of speech, as Opus in Ogg."""
    return (Path(resonance.__file__).parent / "demo_speaker/audio/close_the_door_2.opus").read_bytes()


@pytest.fixture(scope="session")
def spoken(speech: bytes) -> np.ndarray:
    """The same as float32 [samples] at 16 kHz."""
    return read_audio("speech", data=speech)


def wav(samples: np.ndarray, subtype: str = "PCM_16", rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="WAV", subtype=subtype)
    return out.getvalue()


@pytest.fixture(scope="session")
def recording(spoken: np.ndarray) -> bytes:
    """The same as a WAV file."""
    return wav(spoken)


@pytest.fixture(scope="session")
def make_wav() -> Callable[..., bytes]:
    return wav


@pytest.fixture(scope="session")
def start() -> Callable[..., Started]:
    return started
