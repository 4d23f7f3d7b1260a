"""The published Whisper sizes in plain numbers, and what a checkpoint's `config.json` says about its own.

Sources: `ModelDimensions` in openai/whisper `model.py` and the `config.json` of each checkpoint on the Hugging Face hub.
The counts of weights are those of transformers' WhisperForConditionalGeneration: `proj_out` is the token embedding again
and is counted once, the encoder's sinusoids are a parameter that is never trained and are counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from resonance.units import MAX_LABEL_TOKENS, WINDOW_POSITIONS

USUAL = ("large-v3", "medium", "small", "base", "tiny")  # what people choose from, the largest first
CONV_KERNEL = 3  # frames that each of the encoder's two convolutions sees at once


class Linear(NamedTuple):
    """One linear layer, by its name inside a Whisper layer."""

    name: str
    inputs: int
    outputs: int
    bias: bool = True

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        return self.weights + self.outputs * self.bias


@dataclass(frozen=True, slots=True)
class WhisperShape:
    """The numbers in a Whisper configuration that decide about memory and time, under their names there."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    vocab_size: int
    num_mel_bins: int
    max_source_positions: int = WINDOW_POSITIONS
    max_target_positions: int = MAX_LABEL_TOKENS

    @property
    def encoder_linears(self) -> tuple[Linear, ...]:
        """Linear layers of one encoder layer."""
        return (*_attention("self_attn", self.d_model), *_feed_forward(self.d_model, self.encoder_ffn_dim))

    @property
    def decoder_linears(self) -> tuple[Linear, ...]:
        """Linear layers of one decoder layer."""
        return (
            *_attention("self_attn", self.d_model),
            *_attention("encoder_attn", self.d_model),
            *_feed_forward(self.d_model, self.decoder_ffn_dim),
        )

    @property
    def linear_weights(self) -> int:
        """Elements of the weight matrices of all linear layers but `proj_out`, which is the embedding: what
        bitsandbytes quantises."""
        encoder = self.encoder_layers * sum(linear.weights for linear in self.encoder_linears)
        return encoder + self.decoder_layers * sum(linear.weights for linear in self.decoder_linears)

    @property
    def linear_outputs(self) -> int:
        """Rows of those matrices."""
        encoder = self.encoder_layers * sum(linear.outputs for linear in self.encoder_linears)
        return encoder + self.decoder_layers * sum(linear.outputs for linear in self.decoder_linears)

    @property
    def embedding(self) -> int:
        """Elements of the token embedding, and of `proj_out`, which is the same matrix."""
        return self.vocab_size * self.d_model

    @property
    def sinusoids(self) -> int:
        """Elements of the encoder's positional table, which is never trained."""
        return self.max_source_positions * self.d_model

    @property
    def convolutions(self) -> tuple[int, int]:
        """Elements of the weights of conv1 and conv2, without their biases."""
        return CONV_KERNEL * self.num_mel_bins * self.d_model, CONV_KERNEL * self.d_model**2

    @property
    def encoder_parameters(self) -> int:
        """All weights of the encoder, sinusoids included."""
        layer = sum(linear.parameters for linear in self.encoder_linears) + 2 * self._norm
        ends = sum(self.convolutions) + 2 * self.d_model + self.sinusoids + self._norm
        return self.encoder_layers * layer + ends

    @property
    def decoder_parameters(self) -> int:
        """All weights of the decoder, token embedding included."""
        layer = sum(linear.parameters for linear in self.decoder_linears) + 3 * self._norm
        ends = self.embedding + self.max_target_positions * self.d_model + self._norm
        return self.decoder_layers * layer + ends

    @property
    def parameters(self) -> int:
        return self.encoder_parameters + self.decoder_parameters

    @property
    def _norm(self) -> int:
        return 2 * self.d_model  # weight and bias of a layer norm


def _attention(name: str, d_model: int) -> tuple[Linear, ...]:
    return (
        Linear(f"{name}.q_proj", d_model, d_model),
        Linear(f"{name}.k_proj", d_model, d_model, bias=False),
        Linear(f"{name}.v_proj", d_model, d_model),
        Linear(f"{name}.out_proj", d_model, d_model),
    )


def _feed_forward(d_model: int, ffn_dim: int) -> tuple[Linear, ...]:
    return Linear("fc1", d_model, ffn_dim), Linear("fc2", ffn_dim, d_model)


def _published(d_model: int, layers: int, vocab_size: int = 51_865, num_mel_bins: int = 80) -> WhisperShape:
    """Every published size has heads of 64, four times its width inside, and as many decoder as encoder layers."""
    heads, inner = d_model // 64, 4 * d_model
    return WhisperShape(d_model, layers, layers, heads, heads, inner, inner, vocab_size, num_mel_bins)


_MULTILINGUAL = {
    "tiny": _published(384, 4),
    "base": _published(512, 6),
    "small": _published(768, 12),
    "medium": _published(1024, 24),
}
# `.en` has no language and task tokens of its own but one; v3 and turbo have one language more and finer mel bands.
PUBLISHED: dict[str, WhisperShape] = {
    **_MULTILINGUAL,
    **{f"{name}.en": replace(shape, vocab_size=51_864) for name, shape in _MULTILINGUAL.items()},
    "large-v1": _published(1280, 32),
    "large-v2": _published(1280, 32),
    "large-v3": _published(1280, 32, vocab_size=51_866, num_mel_bins=128),
    "large-v3-turbo": replace(_published(1280, 32, vocab_size=51_866, num_mel_bins=128), decoder_layers=4),
}
_OTHER_NAMES = {"large": "large-v1", "turbo": "large-v3-turbo", "large-turbo": "large-v3-turbo"}


def published_shape(name: str) -> WhisperShape | None:
    """The shape of a published size by its own name or its hub name: `small`, `openai/whisper-small`, `turbo`.

    None for every other name, fine-tuned checkpoints included: their `config.json` knows (`shape_from_config`).
    """
    short = re.sub(r"^(openai/)?(whisper-)?", "", name.rstrip("/"))
    return PUBLISHED.get(_OTHER_NAMES.get(short, short))


def shape_from_config(config: Mapping[str, Any]) -> WhisperShape:
    """The shape in the contents of a Whisper checkpoint's `config.json`. Raises KeyError for a missing number."""
    return WhisperShape(**{field.name: int(config[field.name]) for field in fields(WhisperShape)})
