"""Uploads that are no usable recording, and the statuses that each may be refused with."""

from __future__ import annotations

import io
import struct
import zipfile
from functools import cache

import numpy as np
import soundfile

SAMPLE_RATE = 16_000
REFUSED = {400, 413, 415, 422}
PERHAPS = REFUSED | {200}  # what can be read of it may be answered


@cache
def cases() -> list[tuple[str, bytes, set[int]]]:
    """Name, bytes, statuses."""
    tone = wav(0.3 * np.sin(np.arange(SAMPLE_RATE) * 0.2))
    return [
        ("empty", b"", REFUSED),
        ("text", b"Call my sister.\n" * 50, REFUSED),
        ("random bytes", np.random.default_rng(0).bytes(5000), REFUSED),
        ("a zip", zipped(), REFUSED),
        ("only a header", header(SAMPLE_RATE, 1, 0), REFUSED),
        ("cut off", tone[: len(tone) // 2], PERHAPS),
        ("cut off in the header", tone[:30], REFUSED),
        ("claims 4 GB", header(SAMPLE_RATE, 1, 0xFFFFFFF0) + bytes(2000), PERHAPS),
        ("claims 1 Hz", header(1, 1, 20_000) + bytes(20_000), REFUSED),
        ("claims 4 GHz", header(0xFFFFFFFF, 1, 2000) + bytes(2000), REFUSED),
        ("claims 65535 channels", header(SAMPLE_RATE, 65_535, 2000) + bytes(2000), REFUSED),
        ("two hours of silence", silence(7200), REFUSED),
    ]


def wav(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def shortened(clip: bytes, seconds: float) -> bytes:
    """The first seconds of a WAV file."""
    samples, rate = soundfile.read(io.BytesIO(clip), frames=round(seconds * SAMPLE_RATE))
    assert rate == SAMPLE_RATE
    return wav(samples)


def header(rate: int, channels: int, data_bytes: int) -> bytes:
    """A WAV header of 16-bit samples that says this, whatever comes behind it."""
    wide = 2 * channels
    form = struct.pack("<HHIIHH", 1, channels, rate, (rate * wide) & 0xFFFFFFFF, wide & 0xFFFF, 16)
    size = struct.pack("<I", (36 + data_bytes) & 0xFFFFFFFF)
    return b"RIFF" + size + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", data_bytes)


def silence(seconds: int) -> bytes:
    """FLAC: some kilobytes that become hours."""
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", SAMPLE_RATE, 1, format="FLAC", subtype="PCM_16") as file:
        for _ in range(seconds // 60):
            file.write(np.zeros(60 * SAMPLE_RATE, np.int16))
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("recording.wav", b"no")
    return buffer.getvalue()
