"""A training in the numbers that decide how much memory it takes, and the tensors that it trains. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from resonance.model.sizes import CONV_KERNEL, Linear, WhisperShape
from resonance.units import MAX_LABEL_TOKENS, WINDOW_POSITIONS

Side = Literal["encoder", "decoder"]


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """What decides how much memory a training takes, named as in TrainConfig where it is a setting there."""

    shape: WhisperShape
    finetuning: Literal["lora", "full", "frozen_encoder"] = "lora"
    quantization: Literal["none", "8bit", "4bit"] = "none"
    precision: Literal["fp32", "fp16", "bf16"] = "bf16"
    lora_r: int = 16
    lora_dropout: float = 0.05
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    optim: str = "adamw_torch_fused"
    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    positions: int = WINDOW_POSITIONS  # encoder positions of the longest batch, 50 a second
    label_tokens: int = MAX_LABEL_TOKENS  # of the longest label, prompt and special tokens included
    per_device_eval_batch_size: int = 8  # 0: nothing is measured while training
    generation_num_beams: int = 1
    generation_tokens: int = MAX_LABEL_TOKENS  # most that are written, prompt included
    ranks: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    aligns: bool = False  # whether updates before training fit the encoder to a short audio context

    @property
    def computed(self) -> int:
        """Bytes of a number in matrix products."""
        return 4 if self.precision == "fp32" else 2

    @property
    def residual(self) -> int:
        """Bytes of a number between layers: 16 bits where all weights are."""
        return self.computed if self.finetuning == "lora" and self.quantization == "none" else 4

    @property
    def inner(self) -> int:
        """Bytes of a number between fc1 and fc2: bitsandbytes gives back the type of its input, a norm's float32."""
        return self.computed if self.quantization == "none" else 4

    @property
    def sides(self) -> tuple[tuple[Side, int, tuple[Linear, ...]], ...]:
        """Encoder and decoder: the number of layers, and the linear layers in each."""
        shape = self.shape
        return (
            ("encoder", shape.encoder_layers, shape.encoder_linears),
            ("decoder", shape.decoder_layers, shape.decoder_linears),
        )

    def trains(self, side: Side) -> bool:
        """Whether the weights of encoder or decoder are trained themselves, not a low-rank addition to them."""
        return self.finetuning == "full" or (self.finetuning == "frozen_encoder" and side == "decoder")

    def adapts(self, path: str) -> bool:
        """Whether LoRA is put on the module at `path` below `model.`, as PEFT and `model.lora` decide it.

        Layer 0 stands for all layers: a name with the number of another counts as if it named every layer.
        """
        if self.finetuning != "lora":
            return False
        if self.target_modules == ("all-linear",):
            return "layers" in path  # PEFT leaves the output layer out; convolutions are not linear
        full = path if path == "proj_out" else f"model.{path}"
        only = self.target_modules[0]
        if len(self.target_modules) == 1 and not only.replace("_", "").replace(".", "").isalnum():
            return re.fullmatch(only, full) is not None
        names = (re.sub(r"\d+(?=\.)", "0", name) for name in self.target_modules)
        return any(full == name or full.endswith(f".{name}") for name in names)


class Tensor(NamedTuple):
    """Trained tensors of one shape: `copies` of [rows, columns], or of [rows] where columns is 1."""

    side: Side
    copies: int
    rows: int
    columns: int = 1
    embedding: bool = False

    @property
    def size(self) -> int:
        """Elements of one of them."""
        return self.rows * self.columns

    @property
    def elements(self) -> int:
        return self.copies * self.size


def trained_tensors(job: TrainingJob) -> Iterator[Tensor]:
    """Every tensor that gets a gradient. All are float32."""
    return _adapters(job) if job.finetuning == "lora" else _own_weights(job)


def _adapters(job: TrainingJob) -> Iterator[Tensor]:
    """LoRA's pairs: A [r, inputs] and B [outputs, r]."""
    shape, d, r = job.shape, job.shape.d_model, job.lora_r
    for side, layers, linears in job.sides:
        for linear in linears:
            if job.adapts(f"{side}.layers.0.{linear.name}"):
                yield Tensor(side, layers, r, linear.inputs)
                yield Tensor(side, layers, linear.outputs, r)
    for name, channels in (("conv1", shape.num_mel_bins), ("conv2", d)):
        if job.adapts(f"encoder.{name}"):
            yield Tensor("encoder", 1, r, CONV_KERNEL * channels)
            yield Tensor("encoder", 1, d, r)
    for name in ("decoder.embed_tokens", "proj_out"):
        if job.adapts(name):
            yield Tensor("decoder", 1, r, d)
            yield Tensor("decoder", 1, shape.vocab_size, r)


def _own_weights(job: TrainingJob) -> Iterator[Tensor]:
    shape, d = job.shape, job.shape.d_model
    for side, layers, linears in job.sides:
        if job.trains(side):
            for linear in linears:
                yield Tensor(side, layers, linear.outputs, linear.inputs)
                yield Tensor(side, layers * linear.bias, linear.outputs)
            norms = 2 if side == "encoder" else 3
            yield Tensor(side, 2 * (norms * layers + 1), d)
    if job.trains("encoder"):
        yield Tensor("encoder", 1, d, CONV_KERNEL * shape.num_mel_bins)
        yield Tensor("encoder", 1, d, CONV_KERNEL * d)
        yield Tensor("encoder", 2, d)
    yield Tensor("decoder", 1, shape.vocab_size, d, embedding=True)
    yield Tensor("decoder", 1, shape.max_target_positions, d, embedding=True)
