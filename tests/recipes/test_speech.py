from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason="eSpeak NG is not installed: pip install -r recipes/requirements.txt")

from recipes.demo_speaker import manner
from recipes.nano import speech


def test_the_same_seed_gives_the_same_recording_in_another_process() -> None:
    # Within one process eSpeak NG goes on from the state that the phrase before left.
    program = """
import hashlib
import numpy as np
from recipes.demo_speaker import manner
from recipes.nano import speech
random = np.random.default_rng(5)
audio = speech.record([manner.speak("close the door", "en", random)], random).audio
print(hashlib.sha256(audio.tobytes()).hexdigest())
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'src'}"}
    runs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True) for _ in "12"
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64


def test_recordings_stay_in_range_and_say_when_speech_begins() -> None:
    random = np.random.default_rng(0)
    for language, text in (("en", "drink water"), ("zh", "我想喝水")):
        spoken = [speech.say(text, language, speech.draw_voice(random)) for _ in range(2)]
        recording = speech.record(spoken, random, clean=True)
        audio, times = recording.audio, recording.phrases
        assert audio.dtype == np.float32
        assert np.abs(audio).max() <= 1
        loud = np.flatnonzero(np.abs(audio) > 0.1 * np.abs(audio).max()) / 16_000
        assert times[0][0] - 0.02 <= loud[0] <= times[0][1]
        assert times[0][0] - 0.02 <= recording.sounds[0][0] <= times[0][0] + 0.05
        assert times[1][0] <= loud[-1] <= times[1][1] + 0.02 <= len(audio) / 16_000 + 0.04


def test_nobody_speaks_where_nothing_is_said() -> None:
    random = np.random.default_rng(0)
    levels = [float(np.sqrt(np.mean(speech.nothing_said(1.0, random) ** 2))) for _ in range(20)]
    assert max(levels) < 0.11


def test_voices_of_scoring_and_demo_are_never_trained() -> None:
    assert not set(speech.TRAINED) & {*speech.HELD_OUT, speech.DEMO}


def test_takes_of_the_demo_speaker_differ() -> None:
    random = np.random.default_rng(0)
    first, second = (manner.speak("我想喝水", "zh", random) for _ in range(2))
    assert len(first.audio) > 16_000
    assert len(first.audio) != len(second.audio)
