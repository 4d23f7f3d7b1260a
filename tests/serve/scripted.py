"""An engine whose timing and faults a test decides. What it hears is in the samples, so that mixed-up rows show."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from resonance.model.adapters import Info
from resonance.model.lora_weights import LoadedAdapter
from resonance.transcribe.mixed_engine import Row
from resonance.transcribe.recognizer import DecodeSettings, TimedText, Transcript
from resonance.units import SAMPLE_RATE

WAIT = 60.0  # seconds in which whatever a test waits for comes, however slow the machine is


def clip(number: int, seconds: float = 1.0) -> np.ndarray:
    """A clip that is heard as `number`. Loud enough not to be silence, and nobody's speech."""
    audio = np.random.default_rng(number).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)
    audio[0] = number / 1024
    return audio


def number_of(row: Row) -> int:
    return round(float(row.audio[0]) * 1024)


def heard(row: Row) -> str:
    """What the engine makes of it."""
    return f"{row.adapter.name if row.adapter else 'base'} {number_of(row)} of {len(row.audio)} {row.settings.language}"


class ScriptedEngine:
    """Batches wait for `go`. `script` is called with each and may raise."""

    name, fingerprint = "scripted", "f" * 64

    def __init__(self, script: Callable[[Sequence[Row]], object] = lambda rows: None) -> None:
        self.script = script
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Semaphore(0)  # released at the beginning of each batch
        self.batches: list[list[int]] = []  # numbers of the clips
        self.threads: set[int] = set()

    def batch_positions(self, samples: int, adapter: LoadedAdapter | None) -> int:
        return 50 * -(-samples // SAMPLE_RATE)

    def best_clip_seconds(self, adapter: LoadedAdapter | None) -> float:
        return 5.0

    def check(self, settings: DecodeSettings, adapter: LoadedAdapter | None) -> None: ...

    def tokens(self, text: str) -> list[int]:
        return [*text.encode()]

    def transcribe(self, rows: Sequence[Row]) -> list[Transcript]:
        assert len({self.batch_positions(len(row.audio), row.adapter) for row in rows}) == 1
        self.threads.add(threading.get_ident())
        self.batches.append([number_of(row) for row in rows])
        self.entered.release()
        assert self.go.wait(WAIT)
        self.script(rows)
        return [self._transcript(row) for row in rows]

    def _transcript(self, row: Row) -> Transcript:
        seconds = len(row.audio) / SAMPLE_RATE
        text = heard(row)
        return Transcript(text, row.settings.language, (TimedText(0.0, seconds, text),), mean_log_prob=-0.1, timed=True)


def voice(name: str, language: str | None = "en") -> LoadedAdapter:
    """An adapter without weights."""
    info = Info(
        kind="lora",
        base_model="scripted",
        base_fingerprint="f" * 64,
        language=language,
        task="transcribe",
        audio_context="auto",
        audio_margin=0.0,
        normalizer="basic",
        scores={},
        data={},
        settings={},
        versions={},
    )
    return LoadedAdapter(name, "1", "a" * 64, info, {}, 0)
