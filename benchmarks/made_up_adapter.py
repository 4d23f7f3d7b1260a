"""Adapters with random weights for a checkpoint: hundreds of people in seconds, without training one."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COPIED = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class MadeUpAdapter:
    """The files of an adapter folder, by name."""

    files: dict[str, bytes]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file: what the service answers with."""
        return hashlib.sha256(self.files["adapter_model.safetensors"]).hexdigest()

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    def zipped(self) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in self.files.items():
                archive.writestr(name, data)
        return buffer.getvalue()


@dataclass(frozen=True, slots=True)
class Base:
    """The model that adapters are made up for. shapes: (in, out) of its linear layers, by name."""

    name: str
    fingerprint: str
    shapes: dict[str, tuple[int, int]]
    files: dict[str, bytes]  # what an adapter folder copies from it


def make_adapter(base: Base, *, seed: int, rank: int = 4) -> MadeUpAdapter:
    """An adapter for `base`, as `resonance train` leaves one, large enough to be heard."""
    import torch
    from safetensors.torch import save

    from resonance.model.adapters import INFO_FILE, Info, now

    random = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (into, out) in base.shapes.items():
        if not name.endswith(TARGETS):
            continue
        a, b = torch.randn(rank, into, generator=random), torch.randn(out, rank, generator=random)
        weights[f"base_model.model.{name}.lora_A.weight"] = a / into**0.5
        weights[f"base_model.model.{name}.lora_B.weight"] = b / (2 * rank**0.5)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
        "inference_mode": True,
    }
    info = Info(
        kind="lora",
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        language="en",
        task="transcribe",
        audio_context="auto",
        audio_margin=0.6,
        normalizer="basic",
        scores={},
        data={"train_rows": 9, "eval_rows": 3, "hours": 0.01, "longest_clip_seconds": 5.0, "fingerprint": str(seed)},
        settings={},
        versions={},
        created=now(),
    )
    files = dict(base.files)
    files["adapter_model.safetensors"] = save(weights, metadata={"format": "pt"})
    files["adapter_config.json"] = json.dumps(config).encode()
    files[INFO_FILE] = info.model_dump_json().encode()
    return MadeUpAdapter(files)


@cache
def base_of(model: Path) -> Base:
    """The checkpoint in the folder `model`."""
    from safetensors import safe_open

    from resonance.model.load import weights_fingerprint

    shapes = {}
    with safe_open(model / "model.safetensors", framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a dict
            name = key.removesuffix(".weight")
            if name != key and len(shape := weights.get_slice(key).get_shape()) == 2:
                shapes[name if name.startswith("model.") else f"model.{name}"] = (shape[1], shape[0])
    files = {name: (model / name).read_bytes() for name in COPIED if (model / name).is_file()}
    return Base(model.name, weights_fingerprint(str(model)), shapes, files)
