"""The PyTorch engine: the audio context the model was trained with, times, languages, devices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resonance.data.audio_context import AudioContext
from resonance.errors import ConfigError, ModelError, ResonanceError
from resonance.transcribe.decoding import unwrap
from resonance.transcribe.recognizer import DecodeSettings
from resonance.transcribe.torch_engine import TorchRecognizer, load_recognizer
from resonance.units import SAMPLE_RATE

pytestmark = pytest.mark.usefixtures("short_answers")
ENGLISH = DecodeSettings(language="en")


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * SAMPLE_RATE)).astype(np.float32)


def frames_for(seconds: float, margin: float) -> int:
    """Frames of a batch whose longest clip has so many seconds: at least as many, at most 30 % more than needed."""
    frames = 2 * AudioContext("auto", margin).positions(seconds)
    assert 100 * (seconds + margin) <= frames <= 130 * (seconds + margin)
    return frames


def frames_seen(recognizer: TorchRecognizer, clips: list[np.ndarray]) -> list[int]:
    """Frames (100 a second) of each batch that the encoder is given."""
    seen: list[int] = []
    encoder = unwrap(recognizer.whisper.model).model.encoder
    hook = encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    try:
        recognizer.transcribe(clips, ENGLISH)
    finally:
        hook.remove()
    return seen


def adapter_with(run: Path, folder: Path, **info: Any) -> str:
    """A copy of the run's adapter whose resonance.json says something else."""
    shutil.copytree(run / "adapter", folder)
    path = folder / "resonance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | info))
    return str(folder)


@pytest.mark.parametrize(
    ("info", "given", "frames", "longest"),
    [
        ({}, None, frames_for(0.9, margin=0.6), 29.4),
        ({"audio_margin": 0.0}, None, frames_for(0.9, margin=0.0), 30.0),
        ({"audio_context": "full"}, None, 3000, 30.0),
        ({"audio_context": 5.0}, None, 500, 4.4),
        ({}, "full", 3000, 30.0),
        ({}, 2.0, 200, 1.4),
    ],
)
def test_the_adapter_s_audio_context_is_obeyed(
    info: dict[str, Any], given: Any, frames: int, longest: float, finished_run: Path, tmp_path: Path
) -> None:
    recognizer = load_recognizer(adapter_with(finished_run, tmp_path / "adapter", **info), audio_context=given)
    assert frames_seen(recognizer, [clip(0.9), clip(0.5)]) == [frames]
    assert recognizer.max_clip_seconds == pytest.approx(longest)


def test_a_stock_model_gets_its_full_window(tiny_model: Path) -> None:
    recognizer = load_recognizer(str(tiny_model))
    assert frames_seen(recognizer, [clip(0.9)]) == [3000]
    assert recognizer.max_clip_seconds == 30.0
    assert frames_seen(load_recognizer(str(tiny_model), audio_context="auto"), [clip(0.9)]) == [
        frames_for(0.9, margin=0.0)
    ]


def test_a_context_without_room_for_speech_is_refused(finished_run: Path) -> None:
    with pytest.raises(ConfigError, match=r"--audio_context 0.5: .* 0.6 seconds"):
        load_recognizer(str(finished_run), audio_context=0.5)


def test_the_adapter_changes_what_its_base_answers(finished_run: Path) -> None:
    recognizer = load_recognizer(str(finished_run))
    encoder = unwrap(recognizer.whisper.model).model.encoder
    features = np.random.default_rng(0).normal(0, 1, (1, 80, 160)).astype(np.float32)
    import torch

    with torch.inference_mode():
        tuned = encoder(torch.from_numpy(features)).last_hidden_state
        with recognizer.as_base():
            base = encoder(torch.from_numpy(features)).last_hidden_state
            assert recognizer.context.length == "full"
        again = encoder(torch.from_numpy(features)).last_hidden_state
    assert not torch.equal(tuned, base) and torch.equal(tuned, again)


def test_a_clip_is_answered_the_same_alone_and_in_a_batch_of_one_context(finished_run: Path) -> None:
    recognizer = load_recognizer(str(finished_run))
    clips = [clip(0.93, seed=1), clip(0.95, seed=2)]
    scored = DecodeSettings("en", scores=True)
    together = recognizer.transcribe(clips, scored)
    alone = [recognizer.transcribe([one], scored)[0] for one in clips]
    assert [one.text for one in alone] == [one.text for one in together]
    assert [one.mean_log_prob for one in alone] == pytest.approx([one.mean_log_prob for one in together], abs=1e-5)
    assert recognizer.transcribe([], ENGLISH) == []


def test_times_lie_inside_the_clip_and_follow_each_other(tiny_model: Path) -> None:
    settings = DecodeSettings(language="en", times="segment")
    (transcript,) = load_recognizer(str(tiny_model)).transcribe([clip(1.0)], settings)
    assert transcript.segments
    times = [time for s in transcript.segments for time in (s.start, s.end)]
    assert times == sorted(times) and times[-1] <= 1.0


def test_a_model_that_forgot_times_is_not_forced_to_invent_them(shared: Path, real_model: Path) -> None:
    from resonance.data.audio import read_audio

    audio = read_audio(shared / "data" / "torgo" / "audio" / "M03_Session2_0009.flac")
    recognizer = load_recognizer(str(real_model))
    plain, timed = (recognizer.transcribe([audio], DecodeSettings("en", times=t))[0] for t in ("none", "segment"))
    assert plain.text.lower() == timed.text.lower() == "ship"
    (segment,) = timed.segments
    assert segment.text == timed.text and 0 <= segment.start <= segment.end <= len(audio) / SAMPLE_RATE


@pytest.mark.parametrize("num_beams", [1, 3])
def test_words_join_to_the_text_and_their_times_go_forward_within_the_clip(tiny_model: Path, num_beams: int) -> None:
    recognizer = load_recognizer(str(tiny_model))
    clips = [clip(1.0, seed=seed) for seed in range(3)]
    said = 0
    for times in ("segment", "word"):
        found = recognizer.transcribe(clips, DecodeSettings("en", num_beams=num_beams, times=times))
        for segment in (segment for transcript in found for segment in transcript.segments):
            said += 1
            assert segment.confidence is not None and 0 < segment.confidence <= 1
            assert bool(segment.words) == (times == "word")
            marks = [segment.start, *(mark for word in segment.words for mark in (word.start, word.end)), segment.end]
            assert marks == sorted(marks) and marks[0] >= 0 and marks[-1] <= 1.0
            if segment.words:
                assert "".join(word.text for word in segment.words).strip() == segment.text
    assert said


def test_what_was_said_before_changes_the_answer_and_is_no_part_of_it(tiny_model: Path) -> None:
    recognizer = load_recognizer(str(tiny_model))
    audio = [clip(0.7, seed=5)]
    plain = recognizer.transcribe(audio, DecodeSettings("en", scores=True))[0]
    said = recognizer.transcribe(audio, DecodeSettings("en", scores=True, prompt="what was said before " * 50))[0]
    assert said.mean_log_prob != pytest.approx(plain.mean_log_prob, abs=1e-4)
    assert "said before" not in said.text


def test_a_tuned_model_gets_long_recordings_in_pieces_as_long_as_it_knows(finished_run: Path, tmp_path: Path) -> None:
    known = {"train_rows": 1, "eval_rows": 0, "hours": 1, "fingerprint": "x"}
    for longest, best in [(1.2, 5.0), (9.0, 9.0), (29.9, 29.4), (None, 29.4)]:
        folder = adapter_with(finished_run, tmp_path / str(longest), data=known | {"longest_clip_seconds": longest})
        assert load_recognizer(folder).best_clip_seconds == pytest.approx(best)


def test_a_language_is_found_when_none_is_given_and_must_be_known(tiny_model: Path) -> None:
    recognizer = load_recognizer(str(tiny_model))
    assert {t.language for t in recognizer.transcribe([clip(0.5), clip(0.9)], DecodeSettings())} <= {"en", "zh", "de"}
    with pytest.raises(ResonanceError, match=r"<\|fr\|>"):
        recognizer.transcribe([clip(0.5)], DecodeSettings(language="fr"))
    recognizer.whisper.model.generation_config.lang_to_id = None  # as in checkpoints from before transformers 4.30
    with pytest.raises(ModelError, match="--language"):
        recognizer.transcribe([clip(0.5)], DecodeSettings())


def test_cuda_without_a_gpu_is_explained(tiny_model: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ModelError, match="--device cpu"):
        load_recognizer(str(tiny_model), device="cuda")


def test_a_hub_name_without_a_network_says_where_it_looked_and_the_way_out() -> None:
    with pytest.raises(ModelError) as caught:
        load_recognizer("openai/whisper-large-v3")
    said = str(caught.value)
    assert "openai/whisper-large-v3" in said and "https://" in said and "hf download" in said and "folder" in said


@pytest.mark.parametrize("missing", ["no_timestamps_token_id", "alignment_heads"])
def test_a_checkpoint_that_says_little_of_itself_still_gives_times(tiny_model: Path, missing: str) -> None:
    """As fine-tuned before transformers 4.30: no generation_config.json, or one without Whisper's own settings."""
    recognizer = load_recognizer(str(tiny_model))
    setattr(recognizer.whisper.model.generation_config, missing, None)
    (found,) = recognizer.transcribe([clip(1.0)], DecodeSettings("en", times="word", scores=True))
    assert not found.timed or missing == "alignment_heads"
