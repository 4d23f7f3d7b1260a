"""Which weights are trained, and which never are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from resonance.errors import ConfigError
from resonance.model.load import load_whisper
from resonance.model.lora import add_lora, quiet_peft, set_trainable, trainable_share

CPU = torch.device("cpu")
INPUTS = {"input_features": torch.zeros(1, 80, 200), "decoder_input_ids": torch.tensor([[257, 258]])}


def tiny(folder: Path, **settings: Any) -> Any:
    return load_whisper(str(folder), device=CPU, **settings).model


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def lora(model: Any, *target_modules: str, **settings: Any) -> Any:
    return add_lora(model, r=4, alpha=8, dropout=0.0, target_modules=target_modules, **settings)


def test_only_the_matrices_of_the_adapter_are_trained_in_float32(tiny_model: Path) -> None:
    tuned = lora(tiny(tiny_model, dtype=torch.bfloat16), "q_proj", "v_proj")
    names = trained(tuned)
    # 2 encoder layers, 2 decoder layers with self- and cross-attention: 6 attentions x 2 modules x A and B
    assert len(names) == 24 and all("lora_" in name for name in names)
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    few, all_of_them = trainable_share(tuned)
    assert few == 24 * 4 * 32 and all_of_them == few + sum(p.numel() for p in tiny(tiny_model).parameters())


def test_whisper_runs_under_an_adapter_without_a_task_type_and_breaks_with_one(tiny_model: Path) -> None:
    assert lora(tiny(tiny_model), "q_proj")(**INPUTS).logits.shape[:2] == (1, 2)
    copied = LoraConfig(task_type="SEQ_2_SEQ_LM", r=4, target_modules=["q_proj"])
    with quiet_peft():
        broken = get_peft_model(tiny(tiny_model), copied)
    with pytest.raises(TypeError, match="input_ids"):
        broken(**INPUTS)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["all-linear"], 2 * 6 + 2 * 10),  # q k v out fc1 fc2, and the decoder's cross-attention; not proj_out
        (["fc1"], 4),
        (["self_attn.q_proj"], 4),
        ([r".*\.decoder\..*\.(q|v)_proj"], 8),
    ],
)
def test_targets_are_names_all_linear_layers_or_a_pattern(tiny_model: Path, target: list[str], expected: int) -> None:
    assert len(trained(lora(tiny(tiny_model), *target))) == 2 * expected


def test_targets_that_match_nothing_are_answered_with_the_names_there_are(tiny_model: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"query,value matches no layer.*fc1, fc2, k_proj, out_proj, proj_out, q_proj"
    ):
        lora(tiny(tiny_model), "query", "value")


def test_full_fine_tuning_trains_all_but_the_sinusoids(tiny_model: Path) -> None:
    model = tiny(tiny_model)
    set_trainable(model, "full")
    assert trained(model) == {n for n, _ in model.named_parameters()} - {"model.encoder.embed_positions.weight"}


def test_a_frozen_encoder_leaves_the_whole_decoder_to_train(tiny_model: Path) -> None:
    model = tiny(tiny_model)
    set_trainable(model, "frozen_encoder")
    assert trained(model) == {name for name, _ in model.named_parameters() if "encoder." not in name.split("layers")[0]}


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_counts_its_weights_as_before_and_learns_through_the_adapter(
    tiny_model: Path, quantization: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny(tiny_model, quantization=quantization)
    kinds = {type(p).__name__ for p in model.parameters()}
    assert kinds & {"Int8Params", "Params4bit"}
    tuned = lora(model, "q_proj", "v_proj", quantized=True)
    assert trainable_share(tuned) == trainable_share(lora(tiny(tiny_model), "q_proj", "v_proj"))
    tuned.train()
    tuned(**INPUTS).logits.float().logsumexp(-1).mean().backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert gradients.keys() == trained(tuned)
    assert all(g.abs().max() > 0 for name, g in gradients.items() if "lora_B" in name)
