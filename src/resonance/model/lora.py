"""Which weights are trained: LoRA matrices, all of them, or all but the encoder's."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from torch import nn

from resonance.errors import ConfigError
from resonance.messages import _


def add_lora(
    model: Any, *, r: int, alpha: int, dropout: float, target_modules: Sequence[str], quantized: bool = False
) -> Any:
    """A PeftModel around `model` whose only trainable weights are LoRA matrices in float32.

    `target_modules` are names of linear layers, `["all-linear"]`, or one regular expression over full module names.
    Raises ConfigError when they match nothing.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantized:
        # Checkpointing is left to the trainer, which uses the non-reentrant kind.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    # task_type stays None: SEQ_2_SEQ_LM makes PEFT pass `input_ids`, which Whisper's forward does not take.
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=_targets(target_modules), bias="none"
    )
    try:
        with quiet_peft():
            return get_peft_model(model, config)
    except ValueError as error:
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        )
        raise ConfigError(
            [
                _("--target_modules {given} matches no layer of the model. Its linear layers are {names}.").format(
                    given=",".join(target_modules), names=", ".join(names)
                )
            ]
        ) from error


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT 0.21 reads a property that transformers 5.23 calls deprecated; users can do nothing about it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _targets(target_modules: Sequence[str]) -> str | list[str]:
    only = target_modules[0] if len(target_modules) == 1 else ""
    is_pattern = bool(only) and not only.replace("_", "").replace(".", "").isalnum()
    return only if is_pattern else list(target_modules)  # PEFT reads a plain string as a pattern or "all-linear"


def set_trainable(model: Any, what: Literal["full", "frozen_encoder"]) -> None:
    """Make all weights trainable, or all but the encoder's. The encoder's sinusoids never are."""
    model.requires_grad_(True)
    if what == "frozen_encoder":
        model.model.encoder.requires_grad_(False)
    model.model.encoder.embed_positions.requires_grad_(False)


def trainable_share(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters. Those of a quantised layer count as many as before it was quantised."""
    trainable = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if type(parameter).__name__ == "Params4bit":  # two 4-bit values in a byte
            count *= 2
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
