"""The encoder at the length of the audio computes what stock Whisper would with a shorter window."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from resonance.model.context import allow_any_audio_context
from resonance.model.load import load_whisper
from resonance.model.lora import add_lora

CPU = torch.device("cpu")
PROMPT = torch.tensor([[257, 258, 262, 266]])


def features(frames: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 80, frames, generator=torch.Generator().manual_seed(1)) * 2 - 1


def stock_encoder(folder: Path) -> WhisperEncoder:
    return WhisperForConditionalGeneration.from_pretrained(folder).eval().model.encoder


def encode(model: Any, mel: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = model(mel).last_hidden_state
    return hidden


def test_a_full_window_is_computed_as_stock_whisper_does_bit_for_bit(tiny_model: Path) -> None:
    ours = load_whisper(str(tiny_model), device=CPU).model.model.encoder
    mel = features(3000)
    assert torch.equal(encode(ours, mel), encode(stock_encoder(tiny_model), mel))


@pytest.mark.parametrize("positions", [1, 90, 1499])
def test_a_short_window_equals_a_stock_encoder_with_the_sliced_positional_table(
    tiny_model: Path, positions: int
) -> None:
    stock = stock_encoder(tiny_model)
    config = copy.deepcopy(stock.config)
    config.max_source_positions = positions
    state = dict(stock.state_dict())
    state["embed_positions.weight"] = state["embed_positions.weight"][:positions]
    reference = WhisperEncoder(config).eval()
    reference.load_state_dict(state)

    ours = load_whisper(str(tiny_model), device=CPU).model.model.encoder
    mel = features(2 * positions)
    hidden = encode(ours, mel)
    assert hidden.shape == (2, positions, 32)
    torch.testing.assert_close(hidden, encode(reference, mel), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="3000"):  # what transformers says to anything but 30 s
        encode(stock, mel)


def test_the_positional_table_is_kept_whole_and_weights_keep_their_names(tiny_model: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(tiny_model)
    names = {name: value.shape for name, value in model.state_dict().items()}
    allow_any_audio_context(model)
    encode(model.model.encoder, features(200))
    assert {name: value.shape for name, value in model.state_dict().items()} == names


def lora_gradients(folder: Path, *, checkpointing: dict[str, Any] | None, dropout: float = 0.1) -> dict[str, Any]:
    model = load_whisper(str(folder), device=CPU).model
    model.config.use_cache = False
    torch.manual_seed(0)
    tuned = add_lora(model, r=4, alpha=8, dropout=dropout, target_modules=["q_proj", "v_proj", "fc1"])
    with torch.no_grad():  # B is zero at first, and with it the gradients of A
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    if checkpointing is not None:
        tuned.activation_checkpointing_enable(checkpointing)
    tuned.train()
    torch.manual_seed(3)
    logits = tuned(input_features=features(180), decoder_input_ids=PROMPT.expand(2, -1)).logits
    logits.float().logsumexp(-1).mean().backward()
    return {name: p.grad for name, p in tuned.named_parameters() if p.requires_grad}


def test_gradient_checkpointing_gives_lora_the_same_gradients(tiny_model: Path) -> None:
    plain = lora_gradients(tiny_model, checkpointing=None)
    checkpointed = lora_gradients(tiny_model, checkpointing={"use_reentrant": False})
    assert any("encoder" in name for name in plain) and any("decoder" in name for name in plain)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_would_cut_the_adapter_off(tiny_model: Path) -> None:
    # The inputs of a frozen model's layers require no gradient, and the reentrant kind then gives none to the layers.
    with pytest.raises(RuntimeError, match="does not require grad"):
        lora_gradients(tiny_model, checkpointing={"use_reentrant": True})


def test_an_adapter_acts_at_any_context_and_the_base_is_untouched_beneath_it(tiny_model: Path) -> None:
    model = load_whisper(str(tiny_model), device=CPU).model
    mel = features(180)
    base = encode(model.model.encoder, mel)
    tuned = add_lora(model, r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "v_proj"]).eval()
    encoder = tuned.get_base_model().model.encoder
    assert torch.equal(encode(encoder, mel), base)  # a new adapter changes nothing
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.2)
    assert (encode(encoder, mel) - base).abs().max() > 1e-4
    with tuned.disable_adapter():
        assert torch.equal(encode(encoder, mel), base)


def test_two_contexts_in_turn_do_not_disturb_each_other(tiny_model: Path) -> None:
    encoder = load_whisper(str(tiny_model), device=CPU).model.model.encoder
    first = encode(encoder, features(120))
    encode(encoder, features(3000))
    assert torch.equal(encode(encoder, features(120)), first)
