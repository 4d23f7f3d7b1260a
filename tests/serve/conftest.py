"""Adapter folders by the dozen, without training one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

LAYER_ENDS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
COPIED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


@cache
def linear_layers(model: Path) -> dict[str, tuple[int, int]]:
    """The linear layers that an adapter may update, and (in, out) of each."""
    found = {}
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a dict
            name = key.removesuffix(".weight")
            if name != key and name.endswith(LAYER_ENDS):
                out, into = weights.get_slice(key).get_shape()
                found[name if name.startswith("model.") else f"model.{name}"] = (into, out)
    return found


@cache
def fingerprint(model: Path) -> str:
    from resonance.model.load import weights_fingerprint

    return weights_fingerprint(str(model))


def write_adapter(
    folder: Path,
    base: Path,
    *,
    rank: int = 4,
    seed: int = 0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    scale: float = 1.0,
    language: str | None = "en",
    **info: Any,
) -> Path:
    """A complete adapter folder for the checkpoint `base`, as `resonance train` leaves one, with random matrices.

    target_modules: ends of names of linear layers, or `["all-linear"]`; scale: of what an update adds, in terms of its
    input (0: nothing, 1: as much as came in); info: fields of `resonance.json`. What is heard differs from adapter to
    adapter on `openai_shaped`; `tiny_model` says nearly nothing with most.
    """
    from resonance.model.adapters import INFO_FILE, Info

    ends = tuple(f".{name}" for name in (LAYER_ENDS if list(target_modules) == ["all-linear"] else target_modules))
    chosen = {name: shape for name, shape in linear_layers(base).items() if name.endswith(ends)}
    assert chosen, target_modules
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (into, out) in chosen.items():
        a, b = torch.randn(rank, into, generator=random), torch.randn(out, rank, generator=random)
        weights[f"base_model.model.{name}.lora_A.weight"] = a / into**0.5
        weights[f"base_model.model.{name}.lora_B.weight"] = b * (scale / 2 / rank**0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({end[1:] for end in ends}),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    said: dict[str, Any] = {
        "kind": "lora",
        "base_model": str(base),
        "base_fingerprint": fingerprint(base),
        "language": language,
        "task": "transcribe",
        "audio_context": "auto",
        "audio_margin": 0.6,
        "normalizer": "basic",
        "scores": {},
        "data": {"train_rows": 9, "eval_rows": 3, "hours": 0.01, "longest_clip_seconds": 5.0, "fingerprint": str(seed)},
        "settings": {},
        "versions": {},
        "created": "2026-01-01T00:00:00+00:00",
    }
    (folder / INFO_FILE).write_text(Info.model_validate(said | info).model_dump_json())
    for name in COPIED:
        if (base / name).is_file():
            (folder / name).write_bytes((base / name).read_bytes())
    return folder


@pytest.fixture(scope="session")
def make_adapter(tiny_model: Path) -> Callable[..., Path]:
    """`make_adapter(folder, *, rank=4, seed=0, target_modules=("q_proj", "v_proj"), scale=1.0, base=tiny_model,
    language="en", **info)` writes an adapter folder in milliseconds and returns it; see `write_adapter`."""

    def make(folder: Path, *, base: Path | None = None, **settings: Any) -> Path:
        return write_adapter(folder, base or tiny_model, **settings)

    return make


@dataclass(frozen=True)
class Base:
    """What a loaded model tells about itself to those who read adapters for it."""

    name: str
    fingerprint: str
    linear_shapes: dict[str, tuple[int, int]]
    dtype: torch.dtype
    device: torch.device


@pytest.fixture(scope="session")
def tiny_base(tiny_model: Path) -> Base:
    """`tiny_model`, as far as adapters need it."""
    return Base("tiny", fingerprint(tiny_model), linear_layers(tiny_model), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="session")
def crowd(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters of p00000 … p09999, of ranks 1 to 8. For reading only."""
    folder = tmp_path_factory.mktemp("crowd")
    made = [make_adapter(folder / ".made" / str(i), rank=1 + i % 8, seed=i) for i in range(40)]
    for i in range(10_000):
        (folder / f"p{i:05}").symlink_to(made[i % 40])
    return folder
