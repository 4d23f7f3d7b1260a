"""Long audio in windows: every sample once, cuts where nobody speaks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from resonance.data.audio import read_audio
from resonance.transcribe.longform import windows
from resonance.units import SAMPLE_RATE


def covered(audio: np.ndarray, max_seconds: float) -> list[tuple[int, int]]:
    """The windows, after checking that they cover `audio` exactly and are short enough."""
    parts = list(windows(audio, max_seconds))
    edges = [0, *(end for _start, end in parts)]
    assert parts == list(itertools.pairwise(edges)) and edges[-1] == len(audio)
    assert all(0 < end - start <= max_seconds * SAMPLE_RATE for start, end in parts)
    return parts


@pytest.mark.parametrize(("seconds", "number"), [(0.5, 1), (30.0, 1), (30.01, 2), (29.4, 1), (100.0, 4)])
def test_windows_cover_the_audio_exactly(seconds: float, number: int) -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)
    assert number <= len(covered(audio, 30.0)) <= 2 * number


@pytest.mark.parametrize("max_seconds", [0.1, 0.4, 1.0, 29.4])
def test_windows_of_any_length_end(max_seconds: float) -> None:
    covered(np.zeros(7 * SAMPLE_RATE + 123, np.float32), max_seconds)


def test_cuts_fall_into_pauses() -> None:
    random = np.random.default_rng(0)
    audio = random.normal(0, 0.1, 60 * SAMPLE_RATE).astype(np.float32)
    pauses = [(19.0, 19.4), (36.2, 36.6), (52.0, 52.4)]
    for start, end in pauses:
        audio[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)] *= 0.01
    audio[25 * SAMPLE_RATE : 25 * SAMPLE_RATE + 800] = 0  # 50 ms inside a word, quieter than any pause
    cuts = [end / SAMPLE_RATE for _start, end in covered(audio, 30.0)][:-1]
    assert len(cuts) == len(pauses[:2])
    assert all(start < cut < end for cut, (start, end) in zip(cuts, pauses, strict=False))


def test_real_recordings_are_cut_where_it_is_quiet(shared) -> None:
    for path in sorted((shared / "data" / "long_audio").glob("sonnet_*.mp3")):
        audio = read_audio(path)
        parts = covered(audio, 29.4)
        assert len(parts) >= 2
        loudness = np.sqrt(np.mean(np.square(audio)))
        for _start, cut in parts[:-1]:
            around = audio[cut - SAMPLE_RATE // 10 : cut + SAMPLE_RATE // 10]
            assert np.sqrt(np.mean(np.square(around))) < 0.2 * loudness
