"""What the package carries: the small base model and the demo speaker's recordings."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from resonance.data.audio import read_audio
from resonance.data.formats import load_manifest
from resonance.data.tokens import LabelTokenizer
from resonance.model.load import Whisper, load_whisper

NANO = Path(str(files("resonance") / "nano"))
DEMO = Path(str(files("resonance") / "demo_speaker"))


@pytest.fixture(scope="module")
def nano() -> Whisper:
    return load_whisper(str(NANO), device=torch.device("cpu"))


def test_nano_is_small_and_complete() -> None:
    names = {file.name for file in NANO.iterdir()}
    wanted = "config generation_config tokenizer tokenizer_config vocab added_tokens special_tokens_map preprocessor_config normalizer"
    assert {f"{name}.json" for name in wanted.split()} | {"merges.txt", "model.safetensors", "README.md"} <= names
    assert sum(file.stat().st_size for file in NANO.iterdir()) <= 12_000_000


def test_nano_knows_its_languages_and_tasks_after_loading(nano: Whisper) -> None:
    settings = nano.model.generation_config
    assert nano.multilingual
    assert settings.lang_to_id == {code: nano.tokenizer.convert_tokens_to_ids(code) for code in ("<|en|>", "<|zh|>")}
    assert set(settings.task_to_id) == {"transcribe", "translate"}
    assert settings.no_timestamps_token_id == nano.tokenizer.convert_tokens_to_ids("<|notimestamps|>")


def test_nano_writes_any_text_and_daily_words_in_one_token_each(nano: Whisper) -> None:
    labels = LabelTokenizer(nano.tokenizer, True, None)
    for text in ("Ünïcödé 🙂", "鱻", "i want to drink water"):
        assert nano.tokenizer.decode(labels.text_ids(text, "en")).strip() == text
    assert len(labels.text_ids("i want to drink water", "en")) == 5
    assert len(labels.text_ids("我想喝水", "zh")) == 4


def test_demo_speaker_is_small_and_its_lists_fit_its_files() -> None:
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 3_000_000
    rows = json.loads((DEMO / "labels.json").read_text(encoding="utf-8"))
    parts = [json.loads((DEMO / name).read_text(encoding="utf-8")) for name in ("train.json", "test.json")]
    assert len(rows) == 120
    assert len(parts[0]) == 60
    key = "audio"
    assert sorted(row[key] for part in parts for row in part) == sorted(row[key] for row in rows)
    assert {row[key] for row in rows} == {f"audio/{file.name}" for file in (DEMO / "audio").iterdir()}
    assert all(0.5 < len(read_audio(str(DEMO / row[key]))) / 16_000 < 12 for row in rows[::10])


def test_new_phrases_of_the_demo_speaker_are_never_trained() -> None:
    train = {row.text for row in load_manifest(DEMO / "train.json").utterances}
    rows = json.loads((DEMO / "test.json").read_text(encoding="utf-8"))
    assert {row["text"] for row in rows if row["set"] == "test: trained phrase"} <= train
    new = {row["text"] for row in rows if row["set"] == "test: new phrase"}
    assert len(new) >= 25
    assert not new & train
