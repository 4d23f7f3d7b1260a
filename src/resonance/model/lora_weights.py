"""A LoRA adapter as weights in memory, without PEFT: read in milliseconds, shared by every batch that speaks with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resonance.model.adapters import Info


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """The low-rank updates of one adapter. Never changed: a newer version is another object.

    layers: by the name of the linear layer in WhisperForConditionalGeneration (`model.encoder.layers.0.self_attn.q_proj`),
    A [in, rank] and B [rank, out], B multiplied by the scaling, both in the model's precision and on its device.
    """

    name: str
    version: str
    fingerprint: str  # SHA-256 of adapter_model.safetensors, in hexadecimal
    info: Info
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    nbytes: int
