"""Audio longer than the model's window, cut where it is quiet."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from resonance.units import SAMPLE_RATE

BLOCK = SAMPLE_RATE // 50  # 20 ms: the resolution of a cut
PAUSE_BLOCKS = 10  # loudness is averaged over 0.2 s, so that a cut falls into a pause and not into a stop consonant


def windows(audio: np.ndarray, max_seconds: float) -> Iterator[tuple[int, int]]:
    """(first, last + 1) samples of consecutive windows that cover float32 [samples] at 16 kHz.

    No window is longer than `max_seconds`. Each but the last ends at the quietest place of its second half, so nothing is
    left out and nothing comes twice.
    """
    most = int(max_seconds * SAMPLE_RATE)
    start = 0
    while len(audio) - start > most:
        half = start + most // 2
        cut = half + quietest(audio[half : start + most])
        yield start, cut
        start = cut
    yield start, len(audio)


def quietest(audio: np.ndarray) -> int:
    """The sample in the middle of the quietest 0.2 s."""
    blocks = audio[: len(audio) // BLOCK * BLOCK].reshape(-1, BLOCK)
    energy = np.square(blocks, dtype=np.float64).sum(axis=1)
    if len(energy) <= PAUSE_BLOCKS:
        return len(audio) - 1
    smooth = np.convolve(energy, np.ones(PAUSE_BLOCKS), mode="valid")
    return (int(smooth.argmin()) + PAUSE_BLOCKS // 2) * BLOCK
