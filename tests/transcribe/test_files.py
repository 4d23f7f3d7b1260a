"""How windows and batches become one answer for each recording, in order and in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from resonance.transcribe import files, speech
from resonance.transcribe.files import LongAudio, Span, transcribe_files
from resonance.transcribe.recognizer import DecodeSettings, TimedText, Transcript, Word
from resonance.transcribe.result import FileResult
from resonance.units import SAMPLE_RATE


@dataclass
class LengthTeller:
    """A recogniser that answers how many seconds it was given, and notes its batches."""

    max_clip_seconds: float = 30.0
    best_clip_seconds: float = 30.0
    personal: bool = True
    texts: list[str] = field(default_factory=list)
    batches: list[list[float]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    name: str = "teller"

    def transcribe(self, clips: Sequence[np.ndarray], settings: DecodeSettings) -> list[Transcript]:
        lengths = [len(clip) / SAMPLE_RATE for clip in clips]
        assert max(lengths) <= self.max_clip_seconds
        self.batches.append(lengths)
        answers = [self.texts.pop(0) if self.texts else f"{seconds:.2f}" for seconds in lengths]
        return [
            replace(Transcript(text, "en", (self.segment(text, seconds),)), **self.scores)
            for text, seconds in zip(answers, lengths, strict=True)
        ]

    @staticmethod
    def segment(text: str, seconds: float) -> TimedText:
        return TimedText(0.0, seconds / 2, text, 0.5, (Word(0.1, seconds / 2, text, 0.5),))


def write(path: Path, seconds: float) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, int(seconds * SAMPLE_RATE)), SAMPLE_RATE)
    return path


ALL = LongAudio()


def answers(
    recognizer: LengthTeller, spans: list[Span], batch_size: int = 2, long_audio: LongAudio = ALL
) -> list[FileResult]:
    return list(transcribe_files(recognizer, spans, DecodeSettings(), batch_size=batch_size, long_audio=long_audio))


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
    (result,) = answers(LengthTeller(best_clip_seconds=10.0), [Span(path)])
    lengths = [float(text) for text in result.text.split()]
    assert sum(lengths) == pytest.approx(25.0, abs=0.05) and len(lengths) >= 3
    starts = np.cumsum([0.0, *lengths])[:-1]
    assert [s.start for s in result.segments] == pytest.approx(starts, abs=0.05)
    assert [s.words[0].start for s in result.segments] == pytest.approx(starts + 0.1, abs=0.05)
    assert result.duration == 25.0


def test_times_of_a_part_of_a_file_count_from_the_part(tmp_path: Path) -> None:
    path = write(tmp_path / "long.wav", 25.0)
    (result,) = answers(LengthTeller(best_clip_seconds=5.0), [Span(path, 12.0, 24.0)])
    assert result.duration == 12.0 and result.segments[0].start == 0.0 and result.segments[-1].end < 12.0


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["one", "", "two"], "one two"),
        (["我想", "喝水"], "我想喝水"),
        (["我想", "coffee", "谢谢。", "你好"], "我想 coffee 谢谢。你好"),
        (["", "", ""], ""),
    ],
)
def test_windows_are_joined_as_the_script_is_written(texts: list[str], joined: str, tmp_path: Path) -> None:
    recording = files.Recording(Span(tmp_path / "a.wav"), read=True)
    for i, text in enumerate(texts):
        window = files.Window(float(i), 1.0, None, speech.Spoken(0.0, 1.0, 0.0), np.zeros(0, np.float32))
        recording.heard.append((window, Transcript(text, "zh", (TimedText(0.0, 1.0, text),) if text else ())))
    assert recording.result(DecodeSettings(), LongAudio()).text == joined


def test_memory_does_not_grow_with_the_number_or_the_length_of_recordings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "POOL_SECONDS", 2.5)
    spans = [Span(write(tmp_path / f"{i}.wav", 1.0)) for i in range(5)]
    spans.append(Span(write(tmp_path / "long.wav", 40.0)))
    spans.append(Span(spans[5].path, 0.5, 1.0))
    teller = LengthTeller(best_clip_seconds=1.0)
    taken = iter(spans)
    results = transcribe_files(teller, taken, DecodeSettings(), batch_size=8)
    assert next(results).text == "1.00"
    assert sum(map(sum, teller.batches)) < 5  # the first answers are there before the rest is decoded
    assert len(list(results)) == 6
    assert max(map(sum, teller.batches)) <= 3.5


def test_a_list_of_any_length_is_begun_before_it_is_read_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 0.2)
    asked = []

    def endless():  # type: ignore[no-untyped-def]
        while True:
            asked.append(1)
            yield Span(path)

    results = transcribe_files(LengthTeller(), endless(), DecodeSettings(), batch_size=2)
    for _ in range(3):
        assert next(results).text == "0.20"
    results.close()
    assert len(asked) < 200


def test_progress_counts_files_and_seconds_also_in_the_middle_of_a_long_one(tmp_path: Path) -> None:
    spans = [
        Span(write(tmp_path / "long.wav", 60.0)),
        Span(tmp_path / "missing.wav"),
        Span(write(tmp_path / "b.wav", 1)),
    ]
    seen: list[tuple[int, float]] = []
    teller = LengthTeller(best_clip_seconds=2.0)
    list(transcribe_files(teller, spans, DecodeSettings(), batch_size=4, progress=lambda *step: seen.append(step)))
    assert sum(count for count, _seconds in seen) == 3
    assert sum(seconds for _count, seconds in seen) == pytest.approx(61.0)
    assert sum(seconds > 0 for _count, seconds in seen) > 5


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_of_a_recording_that_is_cut_off_the_readable_part_is_transcribed(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"cut.{suffix}"
    tone = 0.3 * np.sin(np.arange(40 * SAMPLE_RATE) / 10) + np.random.default_rng(0).normal(0, 0.01, 40 * SAMPLE_RATE)
    soundfile.write(path, tone, SAMPLE_RATE)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (result,) = answers(LengthTeller(best_clip_seconds=5.0), [Span(path)])
    assert result.error and str(path) in result.error
    assert 15 < result.duration < 25 and result.text
    assert result.segments[-1].start < result.duration


def test_what_nobody_said_is_left_out_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans = [Span(write(tmp_path / f"{i}.wav", 1.0)) for i in range(3)]
    sure = {"a": 0.1, "b": 0.4, "c": 0.9}
    for speech_in, mean_log_prob, kept in [(0.1, -0.1, 0), (0.3, -0.1, 3), (0.3, -2.0, 0), (0.9, -2.0, 3)]:
        monkeypatch.setattr("resonance.transcribe.longform.speech_in", lambda _p, found=speech_in: found)
        teller = LengthTeller(texts=list(sure), scores={"mean_log_prob": mean_log_prob})
        results = answers(teller, spans, long_audio=LongAudio(skip_nonspeech=True))
        assert sum(bool(result.text) for result in results) == kept
        assert sum(len(result.left_out) for result in results) == 3 - kept
        assert all(bool(result.text) != bool(result.left_out) for result in results)
        # Where nobody at all speaks, no time is spent on it.
        assert len(teller.batches) == (0 if speech_in < speech.NOBODY else 2)


def test_without_a_detector_model_and_text_have_to_agree_that_there_is_silence() -> None:
    def left_out(no_speech: float, mean_log_prob: float) -> bool:
        heard = Transcript("a", "en", (), mean_log_prob, no_speech)
        return speech.nobody_spoke(None, heard, no_speech_threshold=0.6, log_prob_threshold=-1.0, loop_ratio=2.4)

    assert [left_out(0.9, -2.0), left_out(0.9, -0.5), left_out(0.1, -2.0)] == [True, False, False]


def test_of_real_recordings_speech_is_heard_in_all_and_in_none_without(shared: Path) -> None:
    """The thresholds: whoever speaks softly or unclearly is heard, a dog and a hall are not."""
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    pytest.importorskip("faster_whisper", exc_type=ImportError)

    def heard(folder: str, every: int, dysarthric: bool = False) -> list[float]:
        place = shared / "data" / folder
        rows = json.loads((place / "labels.json").read_text(encoding="utf-8"))
        rows = [row for row in rows if row["dysarthric"]] if dysarthric else rows
        found = []
        for row in rows[::every]:
            (window,) = files._windows_of(Span(place / row["audio"]), 60.0)
            assert isinstance(window, files.Window) and window.speech is not None
            found.append(window.speech)
        return found

    assert max(heard("nonspeech", 1)) < speech.SOMEBODY < min(heard("torgo", 6, dysarthric=True))


def test_the_language_is_that_of_most_of_what_was_said(tmp_path: Path) -> None:
    recording = files.Recording(Span(tmp_path / "a.wav"), read=True)
    for i, (text, language) in enumerate([("", "en"), ("我想", "zh"), ("喝水", "zh"), ("ok", "en")]):
        window = files.Window(float(i), 1.0, 0.9, speech.Spoken(0.0, 1.0, 1.0), np.zeros(0, np.float32))
        recording.heard.append((window, Transcript(text, language, (TimedText(0.0, 1.0, text),) if text else ())))
    assert recording.result(DecodeSettings(), LongAudio()).language == "zh"
    empty = files.Recording(Span(tmp_path / "b.wav"), read=True)
    assert empty.result(DecodeSettings("de"), LongAudio()).language == "de"


def test_a_phrase_heard_in_noise_is_no_answer(tmp_path: Path) -> None:
    recording = files.Recording(Span(tmp_path / "a.wav"), read=True)
    window = files.Window(0.0, 1.0, 0.1, speech.Spoken(0.0, 1.0, 0.0), np.zeros(0, np.float32))
    heard = Transcript("open the door", "en", (TimedText(0.0, 1.0, "open the door"),), phrase="open the door")
    recording.heard.append((window, heard))
    result = recording.result(DecodeSettings(), LongAudio(skip_nonspeech=True))
    assert (result.text, result.phrase, result.left_out[0].text) == ("", None, "open the door")


def test_thousands_that_cannot_be_read_are_told_as_they_come(tmp_path: Path) -> None:
    taken = []

    def missing():  # type: ignore[no-untyped-def]
        for i in range(5000):
            taken.append(i)
            yield Span(tmp_path / f"{i}.wav")

    results = transcribe_files(LengthTeller(), missing(), DecodeSettings(), batch_size=2)
    assert next(results).error and len(taken) < 200
    assert sum(1 for _result in results) == 4999


def test_quiet_speech_is_speech(shared: Path) -> None:
    """Silero goes by the level: 30 dB down it no longer hears what Whisper still reads."""
    pytest.importorskip("onnxruntime", exc_type=ImportError)
    folder = shared / "data" / "torgo"
    rows = [row for row in json.loads((folder / "labels.json").read_text()) if row["dysarthric"]][::40]
    for row in rows:
        clip, rate = soundfile.read(folder / row["audio"], dtype="float32")
        quiet = (np.round(clip * 10 ** (-35 / 20) * 32768) / 32768).astype(np.float32)
        assert rate == SAMPLE_RATE
        (window,) = files.windows([quiet], 60.0)
        assert window.speech is not None and window.speech > speech.SOMEBODY, row["audio"]
        np.testing.assert_array_equal(window.audio, quiet)  # the model gets it as it is
