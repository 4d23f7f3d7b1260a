"""Whisper's encoder at the length of the audio.

transformers' encoder refuses anything but 30 s. A shorter input needs only the first rows of the positional table.
Stock weights fall apart on it (tiny.en on LibriSpeech: 4.7 -> 226 % WER, the FUTO whisper-acft study); weights trained
with it do not (5.5 %). So a short context belongs to an adapter that was trained with it and that records it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import WhisperForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperEncoder


class AnyLengthWhisperEncoder(WhisperEncoder):  # type: ignore[misc]
    """WhisperEncoder that takes any even number of frames up to its window."""

    def forward(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutput:
        """input_features: [batch, n_mels, frames]. Returns hidden states [batch, frames / 2, d_model]."""
        frames = input_features.shape[-1]
        if frames == 2 * self.config.max_source_positions:
            return super().forward(input_features, attention_mask, **kwargs)
        hidden = torch.nn.functional.gelu(self.conv1(input_features))
        hidden = torch.nn.functional.gelu(self.conv2(hidden)).permute(0, 2, 1)  # [batch, frames / 2, d_model]
        hidden = hidden + self.embed_positions.weight[: hidden.shape[1]]
        hidden = torch.nn.functional.dropout(hidden, p=self.dropout, training=self.training)
        for layer in self.layers:
            if self.training and self.layerdrop > 0 and torch.rand(()) < self.layerdrop:
                continue
            hidden = layer(hidden, None, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(hidden))


def allow_any_audio_context(model: WhisperForConditionalGeneration) -> None:
    """Let a loaded model's encoder take shorter features. Weights and module names stay the same."""
    model.model.encoder.__class__ = AnyLengthWhisperEncoder
