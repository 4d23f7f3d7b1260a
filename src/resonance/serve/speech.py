"""What goes into the service and what comes out, whatever route it came by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resonance.transcribe.recognizer import DecodeSettings
from resonance.transcribe.result import FileResult


@dataclass(slots=True)
class Upload:
    """A file as it was sent. It is never written to disk."""

    data: bytes  # let go of (`b""`) once it is decoded: a video may be larger than its sound by far
    name: str  # for messages only


@dataclass(frozen=True, slots=True)
class Decoded:
    """What could be read of an upload."""

    samples: np.ndarray  # float32 [samples] at 16 kHz, at least one
    warning: str | None  # where and why reading ended before the end: goes into FileResult.error


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechRequest:
    """One recording to transcribe."""

    audio: Upload | np.ndarray  # or samples float32 [samples] at 16 kHz, from a microphone
    patient: str | None  # whose adapter answers; None: the base model
    base_if_missing: bool = False  # the base model answers where the patient has no adapter; otherwise that is an error
    settings: DecodeSettings
    skip_nonspeech: bool = True
    account: str  # who asks, for limits: the name of a token, or the client's address
    deadline: float  # on the clock of time.monotonic()
    may_keep: bool = True  # where recordings are kept at all; not the beginnings of one that is still being spoken


@dataclass(frozen=True, slots=True)
class Voice:
    """Which adapter answered."""

    patient: str
    version: str
    fingerprint: str  # SHA-256 of its weights file, in hexadecimal


@dataclass(frozen=True, slots=True)
class Answer:
    """The transcript, and the proof of what made it."""

    result: FileResult
    voice: Voice | None  # None: the base model
    base_fingerprint: str
