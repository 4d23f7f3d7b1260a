"""The folder that training leaves: complete on another machine, refused on another base, never a pickle."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from resonance.config import TrainConfig
from resonance.errors import AdapterError, ModelError
from resonance.finetune import finetune
from resonance.model.adapters import INFO_FILE, find, read_info
from resonance.model.load import weights_fingerprint
from resonance.transcribe.recognizer import DecodeSettings
from resonance.transcribe.torch_engine import TorchRecognizer, load_recognizer

torch.set_num_threads(1)  # a step takes milliseconds; threads that wait for a busy core make it a second
CLIPS = [0.2 * np.sin(np.arange(n) / 9).astype(np.float32) for n in (8_000, 14_000)]


class Explosive:
    """A pickle of this creates the folder `path` when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for i in range(8):
        noise = 0.1 * np.random.default_rng(i).standard_normal(6_000 + 1_500 * i)
        soundfile.write(folder / f"{i}.wav", noise, 16_000)
    rows = [{"audio": f"{i}.wav", "text": f"row {i}"} for i in range(8)]
    (folder / "labels.json").write_text(json.dumps(rows))
    return folder / "labels.json"


def trained(labels: Path, model: Path, out: Path, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "train_file": labels,
        "model_name_or_path": str(model),
        "output_dir": out,
        "language": "de",
        "max_steps": 2,
        "learning_rate": 0.05,
        "warmup_steps": 0,
        "validation_split": 0.25,
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 0,
        "extra": {"use_cpu": True},
    }
    return finetune(TrainConfig.model_validate(settings | changes), Console(quiet=True))


@pytest.fixture(scope="module")
def adapter(labels: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA adapter of `tiny_model`."""
    return trained(labels, tiny_model, tmp_path_factory.mktemp("lora") / "run")


@pytest.fixture
def copy(adapter: Path, tmp_path: Path) -> Path:
    """The adapter copied to where nothing of its run is."""
    return Path(shutil.copytree(adapter, tmp_path / "carried away" / "适配器"))


def texts(recognizer: TorchRecognizer) -> list[str]:
    return [transcript.text for transcript in recognizer.transcribe(CLIPS, DecodeSettings())]


def logits(recognizer: TorchRecognizer) -> torch.Tensor:
    mel = torch.rand(1, 80, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        result: torch.Tensor = recognizer.whisper.model(
            input_features=mel, decoder_input_ids=torch.tensor([[257, 258, 262]])
        ).logits
    return result


def refused(folder: Path, kind: type[ModelError] = AdapterError, **settings: Any) -> str:
    with pytest.raises(kind) as error:
        load_recognizer(str(folder), device="cpu", **settings)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_the_folder_holds_all_that_transcribing_needs_and_nothing_that_runs_code(adapter: Path) -> None:
    names = {path.name for path in adapter.iterdir()}
    needed = {
        "adapter_config.json",
        "adapter_model.safetensors",
        INFO_FILE,
        "tokenizer.json",
        "preprocessor_config.json",
    }
    converters = {"vocab.json", "merges.txt", "tokenizer_config.json", "README.md"}
    assert needed | converters <= names
    assert {path.suffix for path in adapter.iterdir()} <= {".json", ".safetensors", ".md", ".txt"}
    matrices = sum(weight.nbytes for weight in load_file(adapter / "adapter_model.safetensors").values())
    assert (adapter / "adapter_model.safetensors").stat().st_size < matrices + 10_000  # LoRA matrices and nothing else


def test_resonance_json_says_what_the_folder_is(adapter: Path, tiny_model: Path) -> None:
    info = read_info(adapter)
    assert (info.kind, info.language, info.task) == ("lora", "de", "transcribe")
    assert (info.base_model, info.base_fingerprint) == (str(tiny_model), weights_fingerprint(str(tiny_model)))
    assert (info.audio_context, info.audio_margin) == ("auto", 0.6)
    assert (info.data["train_rows"], info.data["eval_rows"], info.scores["utterances"]) == (6, 2, 2)


def test_it_transcribes_the_same_where_folder_and_base_have_moved(
    adapter: Path, copy: Path, tiny_model: Path, tmp_path: Path
) -> None:
    before = load_recognizer(str(adapter), device="cpu")
    base = shutil.copytree(tiny_model, tmp_path / "base elsewhere")
    after = load_recognizer(str(copy), base_model=str(base), device="cpu")
    assert texts(after) == texts(before)
    assert torch.equal(logits(after), logits(before))
    assert not torch.allclose(logits(after), logits(load_recognizer(str(base), device="cpu")), atol=1e-3)
    assert (after.context.length, after.context.margin_seconds) == ("auto", 0.6)


def test_a_run_folder_stands_for_its_result(adapter: Path) -> None:
    assert find(adapter.parent) == find(adapter) == adapter
    assert torch.equal(
        logits(load_recognizer(str(adapter.parent), device="cpu")), logits(load_recognizer(str(adapter), device="cpu"))
    )


def test_the_base_can_be_asked_without_its_adapter(adapter: Path, tiny_model: Path) -> None:
    tuned, base = load_recognizer(str(adapter), device="cpu"), load_recognizer(str(tiny_model), device="cpu")
    with_adapter = logits(tuned)
    with tuned.as_base():
        assert torch.equal(logits(tuned), logits(base))
        assert tuned.context.length == "full"
    assert torch.equal(logits(tuned), with_adapter) and tuned.context.length == "auto"


def test_another_base_is_refused_and_both_are_named(copy: Path, tiny_model: Path, other_model: Path) -> None:
    text = refused(copy, base_model=str(other_model))
    assert str(tiny_model) in text and str(other_model) in text and "--base_model" in text


def test_a_base_that_is_gone_is_asked_for(copy: Path, tmp_path: Path) -> None:
    info = json.loads((copy / INFO_FILE).read_text())
    (copy / INFO_FILE).write_text(json.dumps(info | {"base_model": str(tmp_path / "gone")}))
    assert "--base_model" in refused(copy, ModelError)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json", INFO_FILE])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert name in refused(copy)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_layers(path: Path) -> None:
    save_file({k.replace("q_proj", "k_proj"): v for k, v in load_file(path).items()}, path, {"format": "pt"})


def fewer_layers(path: Path) -> None:
    save_file({k: v for k, v in load_file(path).items() if "decoder" not in k}, path, {"format": "pt"})


def other_shapes(path: Path) -> None:
    save_file({k: v[:1].contiguous() for k, v in load_file(path).items()}, path, {"format": "pt"})


def no_numbers(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # all that PEFT does about them
@pytest.mark.parametrize("damage", [cut, no_numbers, other_layers, fewer_layers, other_shapes])
def test_damaged_weights_are_a_clean_error_and_never_the_base_models_answer(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy / "adapter_model.safetensors")
    assert "Copy the folder again" in refused(copy)


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 99}', "\udcff"])
def test_a_resonance_json_that_cannot_be_understood_is_a_clean_error(copy: Path, text: str) -> None:
    (copy / INFO_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "damaged" in refused(copy)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin"])
def test_no_pickle_is_ever_read(copy: Path, tmp_path: Path, name: str) -> None:
    trap = tmp_path / "sprung"
    (copy / name).write_bytes(pickle.dumps(Explosive(trap)))
    load_recognizer(str(copy), device="cpu")  # safetensors beside it count
    (copy / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refused(copy)
    assert not trap.exists()


@pytest.mark.parametrize("finetuning", ["full", "frozen_encoder"])
def test_a_fully_fine_tuned_model_needs_no_base(
    labels: Path, tiny_model: Path, tmp_path: Path, finetuning: str
) -> None:
    result = trained(labels, tiny_model, tmp_path / "run", finetuning=finetuning, learning_rate=0.01)
    moved = shutil.move(result, tmp_path / "moved")
    recognizer, base = load_recognizer(str(moved), device="cpu"), load_recognizer(str(tiny_model), device="cpu")
    assert recognizer.info is not None and recognizer.info.kind == "full" and recognizer.context.length == "auto"
    assert not torch.allclose(logits(recognizer), logits(base), atol=1e-3)
    texts(recognizer)
    settings = recognizer.whisper.model.generation_config
    assert settings.lang_to_id == base.whisper.model.generation_config.lang_to_id  # lost on reload if saved carelessly
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, Path(moved)))
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert any("decoder" in name for name in changed)
    assert any("encoder.layers" in name for name in changed) == (finetuning == "full")
    assert weights_fingerprint(str(moved)) != weights_fingerprint(str(tiny_model))


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_an_adapter_trained_on_a_quantised_base_loads_on_the_whole_one(
    labels: Path, wide_model: Path, tmp_path: Path, quantization: str
) -> None:
    pytest.importorskip("bitsandbytes")
    result = trained(labels, wide_model, tmp_path / "run", quantization=quantization)
    recognizer = load_recognizer(str(result), device="cpu")
    assert not torch.allclose(logits(recognizer), logits(load_recognizer(str(wide_model), device="cpu")), atol=1e-3)
    texts(recognizer)


def test_an_unfinished_run_is_told_from_a_result(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    assert "not finished" in refused(tmp_path, ModelError)
