"""A service for tests: with a scripted engine, or the real one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np

from resonance.config_serve import ServeConfig
from resonance.serve.decode_pool import AudioDecoder, audio_decoder
from resonance.serve.keep_audio import KeptAudio
from resonance.serve.metrics import Metrics
from resonance.serve.pool import AdapterPool
from resonance.serve.service import Service
from resonance.serve.speech import SpeechRequest, Upload
from resonance.serve.store import AdapterStore
from resonance.transcribe.recognizer import DecodeSettings


def settings_for(**given: Any) -> ServeConfig:
    return ServeConfig(**{"model": "scripted", "gather_ms": 1.0, "ready_seconds": 60.0} | given)


def service_of(
    engine: Any,
    adapters: Path | None = None,
    *,
    uploads: bool = False,
    budget: int = 1 << 30,
    kept: KeptAudio | None = None,
    **given: Any,
) -> Service:
    """uploads: whether it decodes any; without, no process is started for that."""
    config = settings_for(**given)
    pool = AdapterPool(AdapterStore(adapters), engine, budget, config.refresh_seconds) if adapters else None
    nothing = {"max_seconds": 1.0, "max_upload_bytes": 1, "decode_seconds": 1.0, "memory_bytes": 1}
    decoder = audio_decoder(config) if uploads else AudioDecoder(workers=0, **nothing)
    return Service(config, engine, pool, decoder, Metrics(), kept=kept)


@contextlib.asynccontextmanager
async def running(service: Service) -> AsyncIterator[Service]:
    await service.start()
    try:
        yield service
    finally:
        await service.drain(0)


def request(audio: np.ndarray | Upload, patient: str | None = None, **given: Any) -> SpeechRequest:
    settings = DecodeSettings(**{name: given.pop(name) for name in ("language", "num_beams", "times") if name in given})
    usual: dict[str, Any] = {
        "audio": audio,
        "patient": patient,
        "settings": settings,
        "skip_nonspeech": False,
        "account": "tests",
        "deadline": time.monotonic() + 600,
    }
    return SpeechRequest(**usual | given)


def metric(service: Service, name: str, **labels: str) -> float:
    found = service.metrics.registry.get_sample_value(name, labels)
    return 0.0 if found is None else found
