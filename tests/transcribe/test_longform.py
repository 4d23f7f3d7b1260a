"""Long audio in windows: every sample once, cuts where nobody speaks."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from resonance.data.audio import read_audio
from resonance.transcribe import speech
from resonance.transcribe.longform import windows
from resonance.units import SAMPLE_RATE


@pytest.fixture(params=[True, False], ids=["detector", "energy"])
def detector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With Silero's detector, and as it is without the package that brings it."""
    if request.param:
        pytest.importorskip("faster_whisper", exc_type=ImportError)
    else:
        monkeypatch.setattr(speech, "detector", lambda: None)
    return bool(request.param)


def blocks_of(audio: np.ndarray, length: int = 100_000) -> Iterator[np.ndarray]:
    return (audio[i : i + length] for i in range(0, len(audio), length))


def covered(audio: np.ndarray, max_seconds: float, block: int = 100_000) -> list[tuple[int, int]]:
    """The samples of each window, after checking that they are those of `audio`, each once, and few enough."""
    found = list(windows(blocks_of(audio, block), max_seconds))
    np.testing.assert_array_equal(np.concatenate([window.audio for window in found]), audio)
    edges = np.cumsum([0, *(len(window.audio) for window in found)]).tolist()
    assert [window.start for window in found] == [edge / SAMPLE_RATE for edge in edges[:-1]]
    assert all(0 < len(w.audio) <= max_seconds * SAMPLE_RATE and w.seconds == len(w.audio) / SAMPLE_RATE for w in found)
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize(("seconds", "number"), [(0.5, 1), (30.0, 1), (30.01, 2), (29.4, 1), (100.0, 4)])
def test_windows_cover_the_audio_exactly(seconds: float, number: int, detector: bool) -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)
    assert number <= len(covered(audio, 30.0)) <= 2 * number


@pytest.mark.parametrize("max_seconds", [0.1, 0.4, 1.0, 29.4])
def test_windows_of_any_length_end(max_seconds: float, detector: bool) -> None:
    covered(np.zeros(7 * SAMPLE_RATE + 123, np.float32), max_seconds)


@pytest.mark.parametrize("block", [511, 512, 16_000, 10**9])
def test_windows_are_the_same_however_the_audio_arrives(block: int, detector: bool, shared) -> None:
    audio = read_audio(next((shared / "data" / "long_audio").glob("sonnet_1*")))
    assert covered(audio, 10.0, block) == covered(audio, 10.0)


def test_nothing_gives_no_window() -> None:
    assert list(windows([], 30.0)) == []


def test_cuts_fall_into_pauses(detector: bool) -> None:
    random = np.random.default_rng(0)
    audio = random.normal(0, 0.1, 60 * SAMPLE_RATE).astype(np.float32)
    pauses = [(19.0, 19.4), (36.2, 36.6), (52.0, 52.4)]
    for start, end in pauses:
        audio[int(start * SAMPLE_RATE) : int(end * SAMPLE_RATE)] *= 0.01
    audio[25 * SAMPLE_RATE : 25 * SAMPLE_RATE + 800] = 0  # 50 ms inside a word, quieter than any pause
    cuts = [end / SAMPLE_RATE for _start, end in covered(audio, 30.0)][:-1]
    assert len(cuts) == len(pauses[:2])
    assert all(start < cut < end for cut, (start, end) in zip(cuts, pauses, strict=False))


def test_real_recordings_are_cut_where_it_is_quiet(detector: bool, shared) -> None:
    for path in sorted((shared / "data" / "long_audio").glob("sonnet_*.mp3")):
        audio = read_audio(path)
        parts = covered(audio, 29.4)
        assert len(parts) >= 2
        loudness = np.sqrt(np.mean(np.square(audio)))
        for _start, cut in parts[:-1]:
            around = audio[cut - SAMPLE_RATE // 10 : cut + SAMPLE_RATE // 10]
            assert np.sqrt(np.mean(np.square(around))) < 0.2 * loudness


def test_words_of_people_with_dysarthria_are_not_cut_in_the_middle(detector: bool, shared) -> None:
    """Whose speech is soft and has pauses of its own: joined with known gaps."""
    folder = shared / "data" / "torgo"
    rows = [row for row in json.loads((folder / "labels.json").read_text()) if row["dysarthric"]]
    rows = [row for row in rows if " " not in row["text"]][::20]
    gap = np.zeros(SAMPLE_RATE // 2, np.float32)
    parts, inside = [gap], []
    for row in rows:
        clip = read_audio(folder / row["audio"])
        loud = np.flatnonzero(np.abs(clip) > 0.1 * np.abs(clip).max())
        clip = clip[loud[0] : loud[-1]]
        begin = sum(map(len, parts))
        inside.append((begin, begin + len(clip)))
        parts += [clip, gap]
    cuts = [end for _start, end in covered(np.concatenate(parts), 5.0)][:-1]
    assert len(cuts) >= len(rows) // 4
    torn = [cut for cut in cuts if any(start < cut < end for start, end in inside)]
    assert len(torn) <= len(cuts) // (10 if detector else 5)


def test_hours_are_cut_in_the_memory_of_a_window() -> None:
    block = np.random.default_rng(0).normal(0, 0.1, 16 * SAMPLE_RATE).astype(np.float32)
    tracemalloc.start()
    seconds = sum(window.seconds for window in windows((block for _ in range(225)), 30.0))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds == pytest.approx(3600)
    assert peak < 30e6  # an hour is 230 MB
