"""Checkpoints: what loads, what is refused and in which words, and what tells weights apart."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, WhisperForConditionalGeneration

from resonance.errors import ModelError
from resonance.model.load import choose_device, load_tokenizer, load_whisper, weights_fingerprint
from resonance.model.lora import add_lora

CPU = torch.device("cpu")


class Explosive:
    """A pickle of this creates the file `path` when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def copied(folder: Path, to: Path, *, without: tuple[str, ...] = ()) -> Path:
    shutil.copytree(folder, to)
    for name in without:
        (to / name).unlink()
    return to


def message(name: str | Path, **settings: Any) -> str:
    with pytest.raises(ModelError) as error:
        load_whisper(str(name), device=CPU, **settings)
    assert str(name) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("fixture", "multilingual", "n_mels"),
    [("tiny_model", True, 80), ("english_model", False, 80), ("other_model", True, 128)],
)
def test_a_folder_loads_in_eval_mode_with_what_belongs_to_it(
    request: pytest.FixtureRequest, fixture: str, multilingual: bool, n_mels: int
) -> None:
    folder = request.getfixturevalue(fixture)
    whisper = load_whisper(str(folder), device=CPU)
    assert not whisper.model.training
    assert (whisper.multilingual, whisper.n_mels) == (multilingual, n_mels)
    assert (whisper.window_positions, whisper.max_label_tokens) == (1500, 448)
    assert whisper.feature_extractor.feature_size == n_mels
    assert load_tokenizer(str(folder))[1] == multilingual


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    assert "no such folder" in message(tmp_path / "whisper")


def test_an_incomplete_folder_is_answered_with_the_missing_files(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "part", without=("config.json", "model.safetensors", "tokenizer.json"))
    text = message(folder)
    assert "missing: config.json, tokenizer.json, model.safetensors" in text
    assert "preprocessor_config.json" not in text


def test_another_architecture_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "bert")
    (folder / "config.json").write_text(json.dumps(BertConfig().to_dict()))
    assert "is a bert model, not Whisper" in message(folder)


def test_a_hub_that_cannot_be_reached_is_named_with_the_ways_out() -> None:
    text = message("openai/whisper-small")
    assert "https://huggingface.co" in text and "HF_ENDPOINT" in text
    assert "hf download openai/whisper-small --local-dir" in text
    assert "Traceback" not in text and len(text.splitlines()) <= 4
    with pytest.raises(ModelError, match=r"https://huggingface\.co"):
        load_tokenizer("openai/whisper-small")


def test_pickled_weights_are_refused_and_never_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = copied(tiny_model, tmp_path / "pickled", without=("model.safetensors",))
    trap = tmp_path / "sprung"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Explosive(trap)))
    assert "model.safetensors" in message(folder)
    assert not trap.exists()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "header"])
def test_damaged_weights_are_a_clean_error(tiny_model: Path, tmp_path: Path, damage: str) -> None:
    folder = copied(tiny_model, tmp_path / damage)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    contents = {
        "cut": whole[: len(whole) // 2],
        "text": b"<html>not found</html>",
        "empty": b"",
        "header": b"\xff" * 64,
    }
    weights.write_bytes(contents[damage])
    assert "cannot be loaded" in message(folder)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json"]
)
def test_damaged_json_is_a_clean_error(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = copied(tiny_model, tmp_path / "torn")
    (folder / name).write_text((folder / name).read_text()[:20])
    assert name in message(folder)


def test_weights_that_lack_layers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    # transformers fills what is missing with random numbers and only warns.
    folder = copied(tiny_model, tmp_path / "gaps")
    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "decoder.layers.1" not in k}, folder / "model.safetensors", {"format": "pt"}
    )
    assert "decoder.layers.1" in message(folder)


# --- fingerprints


def fingerprint(folder: Path) -> str:
    return weights_fingerprint(str(folder))


def saved(model: Any, like: Path, to: Path, **settings: Any) -> Path:
    shutil.copytree(like, to)
    (to / "model.safetensors").unlink()
    model.save_pretrained(to, **settings)
    return to


@pytest.fixture
def stock(tiny_model: Path) -> WhisperForConditionalGeneration:
    return WhisperForConditionalGeneration.from_pretrained(tiny_model)


def test_a_fingerprint_names_the_weights_and_not_their_file(
    stock: Any, tiny_model: Path, other_model: Path, tmp_path: Path
) -> None:
    expected = fingerprint(tiny_model)
    assert expected == load_whisper(str(tiny_model), device=CPU).fingerprint
    assert fingerprint(copied(tiny_model, tmp_path / "copy")) == expected
    sharded = saved(stock, tiny_model, tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1 and fingerprint(sharded) == expected
    assert fingerprint(saved(stock.half(), tiny_model, tmp_path / "fp16")) == expected
    assert fingerprint(other_model) != expected


@pytest.mark.parametrize("rate", [1e-3, 1e-5])
def test_one_training_step_changes_the_fingerprint(stock: Any, tiny_model: Path, tmp_path: Path, rate: float) -> None:
    stock.train()
    logits = stock(input_features=torch.rand(1, 80, 3000), decoder_input_ids=torch.tensor([[257, 258]])).logits
    logits.logsumexp(-1).mean().backward()
    torch.optim.AdamW(stock.parameters(), lr=rate).step()
    assert fingerprint(saved(stock, tiny_model, tmp_path / "stepped")) != fingerprint(tiny_model)


def test_merging_an_adapter_changes_the_fingerprint(tiny_model: Path, tmp_path: Path) -> None:
    tuned = add_lora(
        load_whisper(str(tiny_model), device=CPU).model, r=2, alpha=2, dropout=0.0, target_modules=["v_proj"]
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-3)  # one step at the default learning rate
    merged = tuned.merge_and_unload()
    assert fingerprint(saved(merged, tiny_model, tmp_path / "merged")) != fingerprint(tiny_model)


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="--device cpu"):
        choose_device("cuda")
    assert choose_device("cpu") == CPU
