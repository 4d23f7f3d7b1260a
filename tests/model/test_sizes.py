from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration
from transformers.initialization import no_init_weights

from resonance.model.sizes import PUBLISHED, WhisperShape, published_shape, shape_from_config


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_counted_as_transformers_builds_them(name: str) -> None:
    shape = PUBLISHED[name]
    with torch.device("meta"), no_init_weights():
        model = WhisperForConditionalGeneration(
            WhisperConfig(**{field.name: getattr(shape, field.name) for field in fields(WhisperShape)})
        )
    model.tie_weights()
    encoder = sum(parameter.numel() for parameter in model.model.encoder.parameters())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.encoder_parameters == encoder
    assert shape.sinusoids == model.model.encoder.embed_positions.weight.numel()


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("openai/whisper-small", "small"),
        ("openai/whisper-tiny.en", "tiny.en"),
        ("openai/whisper-large", "large-v1"),
        ("openai/whisper-large-v3-turbo", "large-v3-turbo"),
        ("turbo", "large-v3-turbo"),
        ("large-v3", "large-v3"),
        ("whisper-base", "base"),
    ],
)
def test_a_size_is_found_by_its_own_and_its_hub_name(given: str, name: str) -> None:
    assert published_shape(given) is PUBLISHED[name]


@pytest.mark.parametrize("given", ["someone/whisper-small", "openai/whisper-small-tuned", "./small", ""])
def test_another_model_is_not_taken_for_a_published_one(given: str) -> None:
    assert published_shape(given) is None


def test_a_checkpoint_tells_its_shape(tiny_model: Path) -> None:
    shape = shape_from_config(json.loads((tiny_model / "config.json").read_text(encoding="utf-8")))
    assert (shape.d_model, shape.encoder_layers, shape.encoder_ffn_dim, shape.num_mel_bins) == (32, 2, 64, 80)


def test_a_configuration_without_a_number_is_refused() -> None:
    with pytest.raises(KeyError, match="d_model"):
        shape_from_config({"vocab_size": 51_865})
