"""No text is lost or doubled where a long recording is cut, by a recogniser that hears exactly what it is given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from resonance.data.audio import write_wav
from resonance.errors import ModelError
from resonance.transcribe.files import LongAudio, Span, transcribe_files
from resonance.transcribe.recognizer import DecodeSettings, TimedText, Transcript
from resonance.units import SAMPLE_RATE

LOWEST, STEP = 300, 50  # Hz: word i is a tone of LOWEST + i * STEP


@dataclass
class ToneReader:
    """Hears which tones are in a clip, each with its times. A tone at the edge of the clip is cut off."""

    max_clip_seconds: float = 30.0
    best_clip_seconds: float = 30.0
    personal: bool = False
    name: str = "tones"
    writes_times: bool = True
    prompts: list[str | None] = field(default_factory=list)

    def transcribe(self, clips: Sequence[np.ndarray], settings: DecodeSettings) -> list[Transcript]:
        self.prompts.append(settings.prompt)
        return [self.read(clip) for clip in clips]

    def read(self, clip: np.ndarray) -> Transcript:
        found = list(tones(clip))
        segments = tuple(TimedText(start / SAMPLE_RATE, end / SAMPLE_RATE, f"w{n}") for n, start, end in found)
        cut_off = bool(found) and found[-1][2] > len(clip) - SAMPLE_RATE // 50 and len(found) > 1
        text = " ".join(segment.text for segment in segments)
        return Transcript(
            text, "en", segments, timed=self.writes_times, complete_until=segments[-1].start if cut_off else None
        )


def tones(clip: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(number, first sample, last + 1) of the tones in a clip."""
    loud = np.abs(clip) > 1e-3
    # Silence of 50 ms ends a tone; its own zero crossings do not.
    edges = np.flatnonzero(loud)
    if not len(edges):
        return
    for part in np.split(edges, np.flatnonzero(np.diff(edges) > SAMPLE_RATE // 20) + 1):
        start, end = int(part[0]), int(part[-1]) + 1
        if end - start < SAMPLE_RATE // 100:
            continue
        spectrum = np.abs(np.fft.rfft(clip[start:end], SAMPLE_RATE))
        yield round((int(spectrum.argmax()) - LOWEST) / STEP), start, end


@pytest.fixture
def joined(tmp_path: Path) -> tuple[Path, list[TimedText]]:
    """Ninety words of 0.3 to 4 s with gaps of 0.25 to 2 s, and what is said when."""
    random = np.random.default_rng(0)
    parts, said, at = [], [], 0
    for i in range(90):
        gap, length = (int(SAMPLE_RATE * random.uniform(*limits)) for limits in ((0.25, 2.0), (0.3, 4.0)))
        tone = 0.3 * np.sin(2 * np.pi * (LOWEST + i * STEP) * np.arange(length) / SAMPLE_RATE)
        parts += [np.zeros(gap), tone]
        said.append(TimedText((at + gap) / SAMPLE_RATE, (at + gap + length) / SAMPLE_RATE, f"w{i}"))
        at += gap + length
    write_wav(tmp_path / "joined.wav", np.concatenate(parts).astype(np.float32))
    return tmp_path / "joined.wav", said


@pytest.mark.parametrize(
    ("mode", "seconds"), [("windows", 10.0), ("windows", 15.0), ("windows", 30.0), ("sequential", 30.0)]
)
def test_every_word_of_joined_clips_is_heard_once_and_at_its_time(
    mode: str, seconds: float, joined: tuple[Path, list[TimedText]]
) -> None:
    path, said = joined
    reader = ToneReader(max_clip_seconds=seconds, best_clip_seconds=seconds)
    long_audio = LongAudio(mode=mode)  # type: ignore[arg-type]
    (result,) = transcribe_files(reader, [Span(path)], DecodeSettings(), batch_size=4, long_audio=long_audio)
    assert result.text.split() == [one.text for one in said]
    for heard, one in zip(result.segments, said, strict=True):
        assert (heard.start, heard.end) == pytest.approx((one.start, one.end), abs=0.02)


@pytest.mark.parametrize("conditioned", [True, False])
def test_what_was_said_is_told_to_the_model_only_where_asked(
    conditioned: bool, joined: tuple[Path, list[TimedText]]
) -> None:
    path, _said = joined
    reader = ToneReader()
    long_audio = LongAudio(mode="sequential", condition_on_previous_text=conditioned)
    list(transcribe_files(reader, [Span(path)], DecodeSettings(), batch_size=4, long_audio=long_audio))
    prompts = reader.prompts[1:]  # after a look at whether the model writes times
    assert prompts[0] is None and len(prompts) > 5
    assert all(bool(prompt) == conditioned for prompt in prompts[1:])
    if conditioned:
        assert str(prompts[2]).startswith("w0 w1")


def test_a_damaged_tail_keeps_what_was_heard_in_sequence(joined: tuple[Path, list[TimedText]]) -> None:
    path, said = joined
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (result,) = transcribe_files(
        ToneReader(), [Span(path)], DecodeSettings(), batch_size=4, long_audio=LongAudio(mode="sequential")
    )
    assert result.error and len(result.segments) > len(said) // 3


@pytest.mark.parametrize(("personal", "writes_times", "in_sequence"), [(1, 1, False), (0, 1, True), (0, 0, False)])
def test_by_itself_a_stock_model_that_writes_times_decodes_in_sequence(
    personal: bool, writes_times: bool, in_sequence: bool, joined: tuple[Path, list[TimedText]], tmp_path: Path
) -> None:
    path, said = joined
    write_wav(tmp_path / "short.wav", np.zeros(SAMPLE_RATE, np.float32))
    reader = ToneReader(personal=bool(personal), writes_times=bool(writes_times))
    spans = [Span(tmp_path / "short.wav"), Span(path), Span(tmp_path / "missing.wav"), Span(tmp_path / "short.wav")]
    long_audio = LongAudio(mode="auto", condition_on_previous_text=True)
    results = list(transcribe_files(reader, spans, DecodeSettings(), batch_size=4, long_audio=long_audio))
    assert any(reader.prompts) == in_sequence
    assert [len(result.segments) for result in results] == [0, len(said), 0, 0] and results[2].error


def test_a_model_without_times_cannot_decode_in_sequence_and_says_so(joined: tuple[Path, list[TimedText]]) -> None:
    with pytest.raises(ModelError, match="--longform sequential"):
        list(
            transcribe_files(
                ToneReader(writes_times=False),
                [Span(joined[0])],
                DecodeSettings(),
                batch_size=4,
                long_audio=LongAudio(mode="sequential"),
            )
        )


class SureOfTheEnd(ToneReader):
    """A model that says two timestamps at ten seconds of every window, and nothing of what is behind them."""

    def read(self, clip: np.ndarray) -> Transcript:
        heard = super().read(clip[: 10 * SAMPLE_RATE])
        kept = tuple(segment for segment in heard.segments if segment.end < 9.9)
        until = kept[-1].end + 0.05 if kept else None
        return Transcript(" ".join(s.text for s in kept), "en", kept, timed=True, complete_until=until)


def test_what_lies_behind_the_last_sentence_of_the_last_window_is_heard_too(
    joined: tuple[Path, list[TimedText]],
) -> None:
    path, said = joined
    (result,) = transcribe_files(
        SureOfTheEnd(), [Span(path)], DecodeSettings(), batch_size=4, long_audio=LongAudio(mode="sequential")
    )
    assert result.text.split() == [one.text for one in said]


class StepByStep(ToneReader):
    def read(self, clip: np.ndarray) -> Transcript:
        segments = (TimedText(0.0, 0.02, "a"), TimedText(0.02, 1.0, "b"))
        return Transcript("a b", "en", segments, timed=True, complete_until=0.02)


def test_a_model_that_goes_on_by_a_timestamp_each_time_still_ends(joined: tuple[Path, list[TimedText]]) -> None:
    reader = StepByStep()
    list(
        transcribe_files(
            reader, [Span(joined[0])], DecodeSettings(), batch_size=4, long_audio=LongAudio(mode="sequential")
        )
    )
    assert len(reader.prompts) < 20


def test_a_damaged_recording_is_decoded_in_sequence_too_where_that_is_asked(
    joined: tuple[Path, list[TimedText]],
) -> None:
    data = joined[0].read_bytes()
    joined[0].write_bytes(data[: len(data) // 2])
    reader = ToneReader()
    long_audio = LongAudio(mode="sequential", condition_on_previous_text=True)
    (result,) = transcribe_files(reader, [Span(joined[0])], DecodeSettings(), batch_size=4, long_audio=long_audio)
    assert result.error and any(reader.prompts)
