"""What is shown while recordings are transcribed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from resonance.transcribe.progress import TranscribingProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_log_gets_a_line_every_half_minute_with_speed_and_time_left() -> None:
    log, clock = io.StringIO(), Clock()
    progress = TranscribingProgress([Path(f"{i}.wav") for i in range(100)], stream=log, clock=clock)
    for _step in range(60):
        clock.now += 1.0
        progress.advance(1, 8.0)
    progress.clear()
    assert log.getvalue().splitlines() == [
        "30 of 100 recordings, 0:04:00 of audio; 8.0 s of audio in 1 s; 0:01:10 left",
        "60 of 100 recordings, 0:08:00 of audio; 8.0 s of audio in 1 s; 0:00:40 left",
    ]


def test_a_short_run_says_nothing_in_a_log() -> None:
    log = io.StringIO()
    TranscribingProgress([Path("a.wav")], stream=log).advance(1, 5.0)
    assert log.getvalue() == ""


def test_one_long_recording_has_a_time_left_before_it_is_finished(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", np.zeros(100 * 1000), 1000)
    log, clock = io.StringIO(), Clock()
    progress = TranscribingProgress([tmp_path / "long.wav", tmp_path / "gone.wav"], stream=log, clock=clock)
    clock.now = 40.0
    progress.advance(0, 80.0)
    assert log.getvalue() == "0 of 2 recordings, 0:01:20 of audio; 2.0 s of audio in 1 s; 0:00:10 left\n"


def test_a_terminal_has_one_line_that_makes_way_for_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    screen, clock = Terminal(), Clock()
    progress = TranscribingProgress([Path("a.wav")] * 50, stream=screen, clock=clock)
    for _step in range(3):
        clock.now += 1.0
        progress.advance(1, 1.0)
    progress.say("Error: b.wav")
    shown = screen.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\r" + " " * 29 + "\rError: b.wav\n")
    assert all(len(part) <= 29 for part in shown.split("\r"))


def test_a_name_that_the_log_cannot_write_is_escaped() -> None:
    log = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    TranscribingProgress([Path("a.wav")], stream=log).say("Error: 我.wav")
    log.seek(0)
    assert log.read() == "Error: \\u6211.wav\n"
