"""One plain Whisper out of a base and its adapter, in float32, in the memory of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resonance.errors import AdapterError
from resonance.messages import _
from resonance.model.lora import quiet_peft
from resonance.transcribe.decoding import unwrap
from resonance.transcribe.torch_engine import TorchRecognizer

TIED = ("embed_tokens", "proj_out")


@torch.inference_mode(False)
def merge(recognizer: TorchRecognizer) -> Any:
    """The WhisperForConditionalGeneration inside `recognizer`, with its adapter, if it has one, added to the weights.

    It is done in place: `recognizer` is the merged model afterwards. Its weights must be in 16 or 32 bits, not fewer:
    rounded to 8 bits again, part of what the adapter learnt would be lost. Raises AdapterError.
    """
    model = recognizer.whisper.model
    plain = unwrap(model)
    if getattr(plain, "is_quantized", False):
        raise ValueError("merge into a base in 16 or 32 bits")
    if plain is model:
        return plain
    if unties(model):
        # Whisper's output layer is its token embedding. An update of one is not one of the other.
        layer = getattr(plain.proj_out, "base_layer", plain.proj_out)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        plain.config.tie_word_embeddings = False
    with quiet_peft(), torch.no_grad():
        merged = model.merge_and_unload()
    left = [name for name, _value in merged.named_parameters() if "lora_" in name]
    if left:
        raise AdapterError(
            _("The adapter {folder} cannot be merged: {count} of its weights stay apart (such as {name}).").format(
                folder=recognizer.name, count=len(left), name=left[0]
            )
        )
    recognizer.whisper = replace(recognizer.whisper, model=merged)
    return merged


def unties(model: Any) -> bool:
    """Whether an adapter changes the output layer or the token embedding, which are one in every Whisper of OpenAI's."""
    return any(hasattr(module, "lora_A") and name.rsplit(".", 1)[-1] in TIED for name, module in model.named_modules())


def is_tied(model: Any) -> bool:
    """Whether output layer and token embedding will be the same once an adapter, if there is one, is merged."""
    plain = unwrap(model)
    return not unties(model) and plain.proj_out.weight.data_ptr() == plain.model.decoder.embed_tokens.weight.data_ptr()


def parameter_count(model: Any) -> int:
    """Weights of the model, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
