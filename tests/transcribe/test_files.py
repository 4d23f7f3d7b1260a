"""How windows and batches become one answer per file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import soundfile

from resonance.transcribe import files
from resonance.transcribe.files import Span, transcribe_files
from resonance.transcribe.recognizer import DecodeSettings, TimedText, Transcript
from resonance.transcribe.result import FileResult
from resonance.units import SAMPLE_RATE


@dataclass
class LengthTeller:
    """A recogniser that answers how many seconds it was given, and notes its batches."""

    max_clip_seconds: float = 30.0
    texts: list[str] = field(default_factory=list)
    batches: list[list[float]] = field(default_factory=list)
    name: str = "teller"

    def transcribe(self, clips: Sequence[np.ndarray], settings: DecodeSettings) -> list[Transcript]:
        lengths = [len(clip) / SAMPLE_RATE for clip in clips]
        assert max(lengths) <= self.max_clip_seconds
        self.batches.append(lengths)
        answers = [self.texts.pop(0) if self.texts else f"{seconds:.2f}" for seconds in lengths]
        if settings.times == "none":
            return [Transcript(text, "en") for text in answers]
        return [
            Transcript(text, "en", (TimedText(0.0, seconds / 2, text), TimedText(seconds / 2, seconds, "")))
            for text, seconds in zip(answers, lengths, strict=True)
        ]


def write(path: Path, seconds: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, int(seconds * SAMPLE_RATE)), SAMPLE_RATE)
    return path


def answers(
    recognizer: LengthTeller, spans: list[Span], timestamps: bool = False, batch_size: int = 2
) -> list[FileResult]:
    settings = DecodeSettings(times="segment" if timestamps else "none")
    return list(transcribe_files(recognizer, spans, settings, batch_size=batch_size))


def test_clips_of_like_length_share_a_batch_and_answers_keep_the_order_of_the_files(tmp_path: Path) -> None:
    seconds = [3.0, 0.5, 2.0, 0.4, 2.1]
    spans = [Span(write(tmp_path / f"{i}.wav", s)) for i, s in enumerate(seconds)]
    spans.insert(1, Span(tmp_path / "missing.wav"))
    teller = LengthTeller()
    results = answers(teller, spans)
    assert teller.batches == [[0.4, 0.5], [2.0, 2.1], [3.0]]
    assert [r.text for r in results] == ["3.00", "", "0.50", "2.00", "0.40", "2.10"]
    assert [r.error is None for r in results] == [True, False, True, True, True, True]
    assert "missing.wav" in str(results[1].error)


def test_long_audio_loses_and_doubles_nothing_and_its_times_are_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "long.wav", 25.0)
    teller = LengthTeller(max_clip_seconds=10.0)
    (result,) = answers(teller, [Span(path)], timestamps=True)
    lengths = [float(text) for text in result.text.split()]
    assert sum(lengths) == pytest.approx(25.0, abs=0.05) and len(lengths) >= 3
    starts = np.cumsum([0.0, *lengths])
    assert [s.start for s in result.segments] == pytest.approx(starts[:-1], abs=0.05)
    assert result.duration == 25.0


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["one", "", "two"], "one two"),
        (["我想", "喝水"], "我想喝水"),
        (["我想", "coffee", "谢谢。", "你好"], "我想 coffee 谢谢。你好"),
        (["", "", ""], ""),
    ],
)
def test_windows_are_joined_as_the_script_is_written(texts: list[str], joined: str) -> None:
    parts = [(files.Piece(0, float(i), np.zeros(16_000)), Transcript(text, "zh")) for i, text in enumerate(texts)]
    assert files._joined("a.wav", 4.0, parts).text == joined


def test_hours_of_long_files_are_not_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "POOL_SECONDS", 2.5)
    spans = [Span(write(tmp_path / f"{i}.wav", 1.0)) for i in range(5)]
    spans.append(Span(write(tmp_path / "long.wav", 4.0)))
    spans.append(Span(spans[5].path, 0.5, 1.0))
    teller = LengthTeller()
    assert len(answers(teller, spans, batch_size=8)) == 7
    assert [len(batch) for batch in teller.batches] == [2, 2, 1, 1, 1]
