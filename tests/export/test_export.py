"""Models for other programs: what is written is the model, with everything beside it, or nothing."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, WhisperForConditionalGeneration

from resonance.cli import run
from resonance.data.audio import read_audio
from resonance.export import command, ctranslate2, hf
from resonance.export.merge import is_tied, merge
from resonance.model import adapters, exports
from resonance.transcribe import decoding
from resonance.transcribe.recognizer import DecodeSettings
from resonance.transcribe.torch_engine import TorchRecognizer, load_recognizer

SIDE_FILES = {
    *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    *("added_tokens.json", "special_tokens_map.json", "normalizer.json", "generation_config.json"),
    *("config.json", "export.json", "README.md"),
}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights never end their text."""
    for module in (decoding, command):
        monkeypatch.setattr(module, "TOKENS_PER_SECOND", 1)


@pytest.fixture
def sounds(recordings: Callable[..., Path]) -> Path:
    return recordings(count=4)


def export(model: Path, to: str, folder: Path, sounds: Path, *flags: str) -> int:
    """In float32, where random weights choose the same tokens; they choose between tokens that are nearly as likely."""
    place = ["--model_path", str(model), "--to", to, "--output_dir", str(folder)]
    numbers = ["--max_difference", "1"] if to == "ggml" else ["--quantization", "float32"]
    return run(["export", *place, "--check_file", str(sounds), "--language", "en", *numbers, *flags])


def record(folder: Path) -> exports.Record:
    found = exports.read_record(folder)
    assert found is not None
    return found


def logits(model: Any) -> torch.Tensor:
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 80, 200)).astype(np.float32))
    with torch.inference_mode():
        return model(
            input_features=features, decoder_input_ids=torch.tensor([[50258, 50259, 50359, 50363, 300]])
        ).logits


def test_a_merged_model_answers_as_base_and_adapter(tuned_run: Path, openai_shaped: Path) -> None:
    tuned = load_recognizer(str(tuned_run), device="cpu")
    before = logits(tuned.whisper.model)
    with tuned.whisper.model.disable_adapter():
        base = logits(tuned.whisper.model)
    merged = merge(tuned)
    assert type(merged) is WhisperForConditionalGeneration
    assert (logits(merged) - before).abs().max() < 1e-4 * before.abs().max()
    assert (before - base).abs().max() > 1e-2 * before.abs().max()  # or the adapter would have done nothing


def test_an_adapter_of_the_output_layer_leaves_the_token_embedding_alone(openai_shaped: Path) -> None:
    from resonance.model.lora import add_lora

    source = load_recognizer(str(openai_shaped), device="cpu")
    untouched = source.whisper.model.model.decoder.embed_tokens.weight.clone()
    model = add_lora(source.whisper.model, r=2, alpha=4, dropout=0.0, target_modules=["proj_out"]).eval()
    torch.nn.init.normal_(model.base_model.model.proj_out.lora_B["default"].weight)
    tuned = TorchRecognizer(
        type(source.whisper)(
            "tuned", model, source.whisper.tokenizer, source.whisper.feature_extractor, source.whisper.fingerprint
        ),
        source.context,
    )
    before = logits(model)
    assert not is_tied(model)
    merged = merge(tuned)
    assert (logits(merged) - before).abs().max() < 1e-4 * before.abs().max()
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.model.decoder.embed_tokens.weight, untouched)


@pytest.mark.parametrize("quantization", ["float32", "float16", "bfloat16"])
def test_a_folder_for_hugging_face_has_every_file(
    quantization: str, tuned_run: Path, sounds: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    assert export(tuned_run, "hf", folder, sounds, "--quantization", quantization, "--max_difference", "1") == 0
    files = {file.name for file in folder.iterdir()}
    assert files == {*SIDE_FILES, "model.safetensors", "resonance.json"}
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    assert model.dtype == getattr(torch, quantization)
    generation = GenerationConfig.from_pretrained(folder)
    stock = GenerationConfig.from_pretrained(adapters.read_info(tuned_run / "adapter").base_model)
    for name in ("lang_to_id", "task_to_id", "alignment_heads", "suppress_tokens", "begin_suppress_tokens"):
        assert getattr(generation, name) == getattr(stock, name), name
    info = adapters.read_info(folder)
    assert (info.kind, info.language, info.audio_context, info.audio_margin) == ("full", "en", "auto", 0.6)
    assert json.loads((folder / "added_tokens.json").read_text())["<|startoftranscript|>"] == 50_258


def test_a_float32_folder_understands_what_adapter_and_base_do(tuned_run: Path, sounds: Path, tmp_path: Path) -> None:
    assert export(tuned_run, "hf", tmp_path / "out", sounds) == 0
    found = record(tmp_path / "out")
    assert (found.difference, found.clips, found.format) == (0.0, 4, "hf")
    clips = [read_audio(path) for path in sorted(sounds.parent.rglob("*.wav"))]
    original, exported = (
        load_recognizer(str(path), device="cpu").transcribe(clips, DecodeSettings())
        for path in (tuned_run, tmp_path / "out")
    )
    assert [t.text for t in exported] == [t.text for t in original]
    assert len({t.text for t in original}) > 1


@pytest.mark.parametrize("tuned", [False, True])
def test_faster_whisper_understands_an_export(
    tuned: bool, tuned_run: Path, openai_shaped: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    faster_whisper = pytest.importorskip("faster_whisper")
    source = tuned_run if tuned else openai_shaped
    folder = tmp_path / "out"
    assert export(source, "ctranslate2", folder, sounds) == 0
    assert "faster-whisper" in capsys.readouterr().out
    files = {file.name for file in folder.iterdir()}
    assert files == {*SIDE_FILES, "model.bin", "vocabulary.json"} | ({"resonance.json"} if tuned else set())
    config = json.loads((folder / "config.json").read_text())
    assert config["alignment_heads"] == [[1, 0], [1, 1]] and len(config["lang_ids"]) == 99
    found = record(folder)
    assert found.difference == 0.0 and set(found.seconds) == {"torch", "ct2"}
    clip = read_audio(min(sounds.parent.rglob("*.wav")))
    model = faster_whisper.WhisperModel(str(folder), device="cpu", local_files_only=True)
    segments, info = model.transcribe(
        clip,
        language="en",
        beam_size=1,
        temperature=0.0,
        without_timestamps=True,
        max_new_tokens=60,
        no_speech_threshold=None,
    )
    assert next(iter(segments)).text and info.language == "en"


def test_weights_in_8_bits_stay_near(openai_shaped: Path, tmp_path: Path) -> None:
    from resonance.transcribe.ct2_engine import load_ct2_recognizer

    source = load_recognizer(str(openai_shaped), device="cpu", audio_context=2.0)
    features = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 80, 200)).astype(np.float32))
    wanted = decoding.encode(source.whisper.model, features).detach().numpy()
    ctranslate2.write_ctranslate2(tmp_path / "out", source.whisper, "int8")
    model = load_ct2_recognizer(str(tmp_path / "out"), device="cpu").model
    from resonance.transcribe.ct2_engine import storage

    found = np.array(model.encode(storage(features.numpy()), to_cpu=True))
    assert np.abs(found - wanted).mean() < 0.05 * np.abs(wanted).mean()
    assert (tmp_path / "out" / "model.bin").stat().st_size < 0.35 * (openai_shaped / "model.safetensors").stat().st_size


@pytest.mark.parametrize("to", ["hf", "ctranslate2", "ggml"])
def test_an_export_with_wrong_weights_fails_and_leaves_nothing(
    to: str,
    openai_shaped: Path,
    sounds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def damaged(recognizer: TorchRecognizer) -> Any:
        model = merge(recognizer)
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.weight.mul_(1.5)
        return model

    monkeypatch.setattr(command, "merge", damaged)
    assert export(openai_shaped, to, tmp_path / "out", sounds, "--max_difference", "0.3") == 1
    said = capsys.readouterr().err
    assert "does not understand what the original does" in said and "000_phrase_a0.wav" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recordings"]


def test_a_full_disk_leaves_nothing(
    openai_shaped: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))  # the weights take 7 MB and more
    try:
        codes = [export(openai_shaped, to, tmp_path / to, sounds) for to in ("hf", "ctranslate2", "ggml")]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert codes == [1, 1, 1]
    assert capsys.readouterr().err.count("could not be written to") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["recordings"]


def test_too_little_space_is_told_before_the_work(
    openai_shaped: Path,
    sounds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    monkeypatch.setattr(command, "transcribe", lambda *args: pytest.fail("began all the same"))
    assert export(openai_shaped, "hf", tmp_path / "out", sounds) == 1
    assert "are free there" in capsys.readouterr().err


def test_what_lies_at_output_dir_is_kept_unless_told(
    openai_shaped: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert export(openai_shaped, "hf", folder, sounds) == 0
    (folder / "mine.txt").write_text("x")
    assert export(openai_shaped, "hf", folder, sounds) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "mine.txt").is_file()
    assert export(openai_shaped, "hf", folder, sounds, "--overwrite") == 0
    assert not (folder / "mine.txt").exists() and record(folder).quantization == "float32"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    assert export(openai_shaped, "hf", tmp_path / "photos", sounds, "--overwrite") == 1
    assert "no export" in capsys.readouterr().err
    assert (tmp_path / "photos" / "a.jpg").is_file()


def test_a_failed_export_leaves_the_one_before(
    openai_shaped: Path, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    assert export(openai_shaped, "hf", folder, sounds) == 0
    monkeypatch.setattr(
        hf, "write_side_files", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert export(openai_shaped, "hf", folder, sounds, "--overwrite") == 1
    assert record(folder).difference <= 0.03
    assert {path.name for path in tmp_path.iterdir()} == {"recordings", "out"}


def test_an_export_of_a_run_goes_into_it_and_is_checked_on_what_it_held_out(
    tuned_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tuned_run, folder)
    assert run(["export", "--model_path", str(folder), "--to", "hf", "--quantization", "float32"]) == 0
    said = capsys.readouterr().out
    assert "Check: 2 recordings, recordings that the training held out" in said
    assert f"The result is in {folder / 'hf'}" in said
    assert "trained at the length of its recordings" in said


def test_a_base_that_the_adapter_was_not_made_for_is_refused(
    tuned_run: Path, other_model: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(tuned_run, "hf", tmp_path / "out", sounds, "--base_model", str(other_model)) == 1
    said = capsys.readouterr().err
    assert "random-whisper" in said and str(other_model) in said and "--base_model" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_missing_files_of_a_model_are_named(
    name: str, tuned_run: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tuned_run / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / name).unlink()
    assert export(tmp_path / "adapter", "ctranslate2", tmp_path / "out", sounds) == 1
    said = capsys.readouterr().err
    assert name in said and "incomplete" in said and "Traceback" not in said


def test_an_export_is_not_exported_again(
    openai_shaped: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(openai_shaped, "ggml", tmp_path / "out", sounds, "--quantization", "f16") == 0
    assert export(tmp_path / "out", "hf", tmp_path / "again", sounds) == 1
    assert str(openai_shaped) in capsys.readouterr().err


def test_settings_that_do_not_go_together_are_refused(
    openai_shaped: Path, sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(openai_shaped, "ggml", tmp_path / "out", sounds, "--quantization", "int8") == 2
    assert "q8_0, f16" in capsys.readouterr().err
    assert run(["export", "--model_path", str(openai_shaped), "--to", "hf"]) == 2
    assert "--output_dir" in capsys.readouterr().err
