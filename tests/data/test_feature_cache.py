"""Features kept on disk are those of the recordings, whatever happened to the folder, and are computed once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console

from resonance.config import TrainConfig
from resonance.data import feature_cache
from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.data.feature_cache import FeatureCache, Features
from resonance.data.manifest import Utterance
from resonance.errors import AudioError, RunFolderError
from resonance.finetune import finetune
from resonance.model.runs import read_events

HALF_PRECISION = 6e-4  # features lie between -1.5 and 2: half a step of float16 there
AUTO = AudioContext("auto", 0.6)


def clip(path: Path, samples: int, seed: int = 0, level: float = 0.3) -> Utterance:
    noise = np.random.default_rng(seed).standard_normal(samples) * np.abs(np.sin(np.arange(samples) / 3000))
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, (level * noise).clip(-1, 1), 16_000, subtype="FLOAT")
    return Utterance(str(path), "text", 1)


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    decoded: list[str] = []
    real = feature_cache.read_audio

    def read(path: Any, *given: Any) -> Any:
        decoded.append(Path(path).name)
        return real(path, *given)

    monkeypatch.setattr(feature_cache, "read_audio", read)
    return decoded


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("context", [AUTO, AudioContext("full", 0.6), AudioContext(30.0, 0.0)])
@pytest.mark.parametrize("samples", [160, 7_000, 48_017, 479_400, 479_700, 479_999, 480_000])
def test_kept_features_are_those_of_the_audio(tmp_path: Path, samples: int, context: AudioContext, n_mels: int) -> None:
    rows = [clip(tmp_path / "a.wav", samples), clip(tmp_path / "b.wav", max(160, samples // 3), seed=1, level=0.01)]
    cache = FeatureCache(tmp_path / "features", n_mels)
    computed, known = ([cache.features(row) for row in rows] for _pass in range(2))
    audio = [soundfile.read(row.audio, dtype="float32")[0] for row in rows]
    fresh = batch_features(audio, context, n_mels)
    for kept in (computed, known):
        torch.testing.assert_close(batch_features(kept, context, n_mels), fresh, atol=HALF_PRECISION, rtol=0)


def test_digital_silence_is_kept_too(tmp_path: Path) -> None:
    row = clip(tmp_path / "a.wav", 8_000, level=0.0)
    kept = FeatureCache(tmp_path / "features", 80).features(row)
    fresh = batch_features([np.zeros(8_000, dtype=np.float32)], AUTO, 80)
    torch.testing.assert_close(batch_features([kept], AUTO, 80), fresh, atol=HALF_PRECISION, rtol=0)


def test_a_recording_is_decoded_once_wherever_it_lies_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decoding(monkeypatch)
    row = clip(tmp_path / "here" / "a.wav", 8_000)
    moved = clip(tmp_path / "there" / "b.wav", 8_000)  # the same content
    part = Utterance(row.audio, "text", 2, start=0.1, end=0.3)
    for _pass in range(2):
        for utterance in (row, moved, part):
            FeatureCache(tmp_path / "features", 80).features(utterance)
    assert decoded == ["a.wav", "a.wav"]  # the file and the part of it
    FeatureCache(tmp_path / "features", 128).features(row)
    assert len(decoded) == 3
    clip(tmp_path / "here" / "a.wav", 8_000, seed=9)
    os.utime(row.audio, ns=(1, 1))  # as a copying program may leave it
    FeatureCache(tmp_path / "features", 80).features(row)
    assert len(decoded) == 4


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"", lambda whole: b"x" * 400]
)
def test_a_damaged_file_is_written_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    row, cache = clip(tmp_path / "a.wav", 8_000), FeatureCache(tmp_path / "features", 80)
    kept = cache.features(row)
    (file,) = cache.folder.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = cache.features(row)
    assert np.array_equal(again.values, kept.values) and again.samples == kept.samples == 8_000
    assert file.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(tmp_path: Path) -> None:
    rows = [clip(tmp_path / "a.wav", 8_000), clip(tmp_path / "b.wav", 9_000)]
    kept = [FeatureCache(tmp_path / "features", 80).features(row) for row in rows]
    (tmp_path / "file").write_text("in the way")
    blocked = FeatureCache(tmp_path / "file" / "features", 80)
    for row, wanted in zip(rows, kept, strict=True):
        assert np.array_equal(blocked.features(row).values, wanted.values)  # rounded as the kept ones are


def test_the_last_of_the_disk_is_left_to_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "LEFT_FREE", 1 << 62)
    cache = FeatureCache(tmp_path / "features", 80)
    assert isinstance(cache.features(clip(tmp_path / "a.wav", 8_000)), Features)
    assert not [*cache.folder.rglob("*.safetensors*")]


def test_an_unreadable_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="missing\\.wav"):
        FeatureCache(tmp_path / "features", 80).features(Utterance(str(tmp_path / "missing.wav"), "text", 1))


@pytest.fixture
def train(recordings: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    labels = recordings(12)

    def run(name: str, **changes: Any) -> list[dict[str, Any]]:
        given = {"train_file": labels, "model_name_or_path": str(tiny_model), "output_dir": tmp_path / name}
        settings = {"max_steps": 6, "logging_steps": 1, "context_alignment_steps": 0, "dataloader_num_workers": 0}
        settings |= {
            "lora_dropout": 0.0,
            "per_device_train_batch_size": 4,
            "apply_spec_augment": True,
            "language": "en",
        }
        finetune(TrainConfig.model_validate(given | settings | changes), Console(quiet=True))
        return read_events(tmp_path / name / "events.jsonl")

    return run


def test_a_training_from_kept_features_is_the_same_and_decodes_each_recording_once(
    train: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decoding(monkeypatch)
    plain = train("plain")
    assert not decoded
    kept = train("kept", feature_cache="disk")
    assert sorted(set(decoded)) == sorted(decoded) and len(decoded) == 12
    assert (tmp_path / "kept" / "features").is_dir()
    again = train("again", feature_cache_dir=tmp_path / "kept" / "features")
    assert len(decoded) == 12
    losses = [[row["loss"] for row in events if "loss" in row] for events in (plain, kept, again)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3) and losses[1] == losses[2]


def test_workers_share_the_folder(train: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    train("many", feature_cache="disk", dataloader_num_workers=2)
    files = [*(tmp_path / "many" / "features").rglob("*")]
    assert sum(file.is_file() for file in files) == 12 and not [file for file in files if file.suffix == ".part"]


def test_a_folder_that_is_a_file_is_said_before_training(train: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(RunFolderError, match=r"taken.*--feature_cache_dir"):
        train("nothing", feature_cache_dir=tmp_path / "taken")


@pytest.mark.parametrize("given", [{"speed_perturbation": 0.1}, {"gain_db": 6.0}])
def test_changing_the_recordings_and_keeping_their_features_is_refused(given: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"feature_cache disk.*{next(iter(given))}"):
        TrainConfig.model_validate(
            {"train_file": tmp_path, "output_dir": tmp_path / "run", "feature_cache": "disk", **given}
        )
