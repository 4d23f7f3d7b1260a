"""CTranslate2 against PyTorch: the same weights and clips give the same answers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from resonance.cli import run
from resonance.config_io import from_mapping
from resonance.config_recognizer import TranscribeConfig
from resonance.data.audio import read_audio
from resonance.data.formats import load_manifest
from resonance.errors import ModelError
from resonance.export.check import DEMO_SPEAKER
from resonance.export.ctranslate2 import write_ctranslate2
from resonance.model import exports
from resonance.transcribe import decoding, engines, torch_engine
from resonance.transcribe.ct2_engine import Ct2Recognizer, load_ct2_recognizer
from resonance.transcribe.recognizer import DecodeSettings
from resonance.transcribe.torch_engine import TorchRecognizer, load_recognizer

pytest.importorskip("ctranslate2", reason="CTranslate2 is not installed")


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never end their text."""
    monkeypatch.setattr(decoding, "TOKENS_PER_SECOND", 1)


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    rows = load_manifest(DEMO_SPEAKER / "labels.json").utterances[:40:10]
    return [read_audio(Path(row.audio)) for row in rows]


Pair = tuple[TorchRecognizer, Ct2Recognizer]


@pytest.fixture(scope="module")
def both(openai_shaped: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("ct2") / "model"
    pytorch = load_recognizer(str(openai_shaped), device="cpu", audio_context="auto")
    write_ctranslate2(folder, pytorch.whisper, "float32")
    ct2 = load_ct2_recognizer(str(folder), device="cpu", audio_context="auto")
    return pytorch, replace(ct2, writes_timestamps=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The model that comes with the package: small, it follows what is said, and writes times."""
    folder = tmp_path_factory.mktemp("ct2") / "nano"
    pytorch = load_recognizer("resonance/nano", device="cpu")
    write_ctranslate2(folder, pytorch.whisper, "float32")
    ct2 = load_ct2_recognizer(str(folder), device="cpu", audio_context="auto")
    return pytorch, replace(ct2, context=pytorch.context)


@pytest.mark.parametrize("language", [None, "en", "zh"])
def test_texts_languages_and_scores_are_the_same(language: str | None, both: Pair, clips: list[np.ndarray]) -> None:
    wanted, found = (r.transcribe(clips, DecodeSettings(language, scores=True)) for r in both)
    assert [t.text for t in found] == [t.text for t in wanted]
    assert [t.language for t in found] == [t.language for t in wanted]
    assert len({t.text for t in found}) == len(clips)
    for a, b in zip(found, wanted, strict=True):
        assert a.mean_log_prob == pytest.approx(
            b.mean_log_prob, abs=0.1
        )  # of a text that was cut off, one counts its end
        assert a.no_speech_probability == pytest.approx(b.no_speech_probability, rel=1e-2, abs=1e-6)
        assert a.compression_ratio == b.compression_ratio


@pytest.mark.parametrize("timed", [False, True])
def test_a_trained_model_s_texts_scores_and_word_times_are_the_same(
    timed: bool, trained: Pair, clips: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_engine, "timestamp_share", lambda *args: torch.tensor(float(timed)))
    pair = trained[0], replace(trained[1], writes_timestamps=timed)
    wanted, found = (r.transcribe(clips, DecodeSettings("en", times="word")) for r in pair)
    assert [t.timed for t in found] == [timed] * len(clips)
    assert [t.text for t in found] == [t.text for t in wanted]
    assert [t.mean_log_prob for t in found] == pytest.approx([t.mean_log_prob for t in wanted], abs=1e-3)
    for a, b, clip in zip(found, wanted, clips, strict=True):
        words, others = ([w for s in t.segments for w in s.words] for t in (a, b))
        assert [w.text for w in words] == [w.text for w in others] and words
        for word, other in zip(words, others, strict=True):
            assert (word.start, word.end) == pytest.approx((other.start, other.end), abs=0.1)
            # CTranslate2's alignment looks at the text without times, and counts suppressed tokens among the others.
            assert word.confidence == pytest.approx(other.confidence, abs=0.2 if timed else 0.05)
        assert words[-1].end <= len(clip) / 16_000


def test_a_model_that_writes_times_gives_segments(both: Pair, clips: list[np.ndarray]) -> None:
    timed = replace(both[1], writes_timestamps=True)
    for transcript, clip in zip(timed.transcribe(clips, DecodeSettings("en", times="segment")), clips, strict=True):
        times = [time for s in transcript.segments for time in (s.start, s.end)]
        assert transcript.timed and times == sorted(times) and times[-1] <= len(clip) / 16_000
        assert all(s.confidence is not None and 0 <= s.confidence <= 1 for s in transcript.segments)


def test_an_improbable_text_is_decoded_again_hotter_and_always_alike(both: Pair, clips: list[np.ndarray]) -> None:
    settings = DecodeSettings("en", temperatures=(0.0, 0.8), log_prob_threshold=-1e-3)
    first, again = (both[1].transcribe(clips, settings) for _time in range(2))
    assert [t.text for t in first] == [t.text for t in again]
    best = {t.temperature for t in first}
    assert best <= {0.0, 0.8}


def test_what_was_said_before_is_taken_up_and_long_texts_fit(both: Pair, clips: list[np.ndarray]) -> None:
    settings = DecodeSettings("en", prompt="what was said before " * 80)
    with_prompt = both[1].transcribe(clips, settings)
    assert [t.text for t in with_prompt] == [t.text for t in both[0].transcribe(clips, settings)]
    assert [t.text for t in with_prompt] != [t.text for t in both[1].transcribe(clips, DecodeSettings("en"))]


def test_a_shorter_audio_context_reaches_the_encoder(both: Pair, clips: list[np.ndarray]) -> None:
    wide = replace(both[1], context=replace(both[1].context, length="full"))
    assert (
        both[1].transcribe(clips, DecodeSettings("en"))[0].text != wide.transcribe(clips, DecodeSettings("en"))[0].text
    )
    assert (both[1].max_clip_seconds, both[1].best_clip_seconds, both[1].personal) == (30.0, 30.0, False)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.bin", "vocabulary.json", "preprocessor_config.json"])
def test_missing_files_are_named(name: str, both: Pair, tmp_path: Path) -> None:
    shutil.copytree(both[1].folder, tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_ct2_recognizer(str(tmp_path / "model"))


def test_a_damaged_file_is_one_message(both: Pair, tmp_path: Path) -> None:
    shutil.copytree(both[1].folder, tmp_path / "model")
    data = (tmp_path / "model" / "model.bin").read_bytes()
    (tmp_path / "model" / "model.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="Export it again"):
        load_ct2_recognizer(str(tmp_path / "model"))


@pytest.fixture(scope="module")
def exported_run(tuned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an export for CTranslate2 in it."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(tuned_run, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "TOKENS_PER_SECOND", 1)
        assert run(["export", "--model_path", str(folder), "--to", "ctranslate2", "--max_difference", "1"]) == 0
    return folder


def chosen(model: Path, **settings: str) -> object:
    config = from_mapping(TranscribeConfig, {"model_path": str(model), "audio_path": "a.wav", **settings})
    return engines.load_recognizer_for(config)


def with_speed(run_folder: Path, folder: Path, torch: float, ct2: float) -> Path:
    """A copy of the run whose export was so fast."""
    shutil.copytree(run_folder, folder)
    record = exports.read_record(folder / "ctranslate2")
    assert record is not None
    slow = record.model_copy(update={"seconds": {"torch": torch, "ct2": ct2}})
    (folder / "ctranslate2" / "export.json").write_text(slow.model_dump_json(), encoding="utf-8")
    return folder


def test_auto_takes_an_export_that_was_faster(exported_run: Path, tmp_path: Path) -> None:
    fast = with_speed(exported_run, tmp_path / "fast", torch=2.0, ct2=1.0)
    assert isinstance(chosen(fast, device="cpu"), Ct2Recognizer)
    assert isinstance(chosen(fast / "adapter", device="cpu"), Ct2Recognizer)
    assert isinstance(chosen(fast, engine="torch"), TorchRecognizer)
    slow = with_speed(exported_run, tmp_path / "slow", torch=1.0, ct2=2.0)
    assert isinstance(chosen(slow, device="cpu"), TorchRecognizer)
    assert isinstance(chosen(slow, device="cpu", engine="ct2"), Ct2Recognizer)
    assert isinstance(chosen(slow / "ctranslate2", device="cpu"), Ct2Recognizer)


def test_another_folder_in_the_run_is_transcribed_with_itself(
    exported_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_speed(exported_run, tmp_path / "run", torch=2.0, ct2=1.0)
    assert run(["export", "--model_path", str(folder), "--to", "hf", "--max_difference", "1"]) == 0
    found = chosen(folder / "hf", device="cpu")
    assert isinstance(found, TorchRecognizer) and found.name == str(folder / "hf")
    assert run(["export", "--model_path", str(folder), "--to", "ggml", "--max_difference", "1"]) == 0
    with pytest.raises(ModelError, match=f"whisper.cpp, .* made from {folder}"):
        chosen(folder / "ggml")


def test_an_export_of_older_weights_is_not_used(
    exported_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = with_speed(exported_run, tmp_path / "run", torch=2.0, ct2=1.0)
    from safetensors.torch import load_file, save_file

    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in load_file(file).items()}, file)
    assert isinstance(chosen(folder, device="cpu"), TorchRecognizer)
    assert "--overwrite" in capsys.readouterr().err
    with pytest.raises(ModelError, match="resonance export"):
        chosen(folder, engine="ct2")


def test_ct2_without_an_export_says_what_to_type(tuned_run: Path, openai_shaped: Path) -> None:
    with pytest.raises(ModelError, match=f"resonance export --model_path {tuned_run} --to ctranslate2"):
        chosen(tuned_run, engine="ct2")
    with pytest.raises(ModelError, match="--output_dir"):
        chosen(openai_shaped, engine="ct2")


def test_torch_on_a_model_for_ctranslate2_names_the_original(exported_run: Path) -> None:
    for call in (
        lambda: chosen(exported_run / "ctranslate2", engine="torch"),
        lambda: load_recognizer(str(exported_run / "ctranslate2")),
    ):
        with pytest.raises(ModelError, match=f"made from {exported_run}"):
            call()


def test_the_exported_model_keeps_what_the_adapter_was_trained_for(exported_run: Path, clips: list[np.ndarray]) -> None:
    found = load_ct2_recognizer(str(exported_run / "ctranslate2"), device="cpu")
    torch = load_recognizer(str(exported_run), device="cpu")
    assert (found.context, found.personal) == (torch.context, True)
    assert (found.max_clip_seconds, found.best_clip_seconds) == (torch.max_clip_seconds, torch.best_clip_seconds)
    assert {t.language for t in found.transcribe(clips, DecodeSettings())} == {"en"}
