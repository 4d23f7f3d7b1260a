"""Ways to train the same in less memory, from the least to the most costly one (row by row what users did by hand).

8-bit weights first, then smaller batches with more accumulation (the effective batch stays: 8x1, 4x2, 2x4, 1x8), then
gradient checkpointing, last shorter audio. A smaller model is the user's decision: it is another training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from resonance.config import ZERO_STAGES, TrainConfig, alignment_steps
from resonance.data.audio_context import AudioContext
from resonance.model.job import TrainingJob
from resonance.model.sizes import WhisperShape

Precision = Literal["fp32", "fp16", "bf16"]

SHORTER = 0.8  # of the longest audio, at each rung
SHORTEST_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Rung:
    """What one rung changes. Named as in TrainConfig."""

    quantization: Literal["none", "8bit", "4bit"]
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    max_audio_len: float

    @property
    def effective_batch(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def rung_of(config: TrainConfig, longest: float) -> Rung:
    """Where `config` stands, with recordings of up to `longest` seconds."""
    return Rung(
        config.quantization,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.gradient_checkpointing,
        min(config.max_audio_len, longest),
    )


def job_for(
    config: TrainConfig, shape: WhisperShape, rung: Rung, precision: Precision, label_tokens: int
) -> TrainingJob:
    """`config` on this rung as the byte model takes it, without evaluation. `label_tokens`: of the longest label."""
    context = AudioContext(config.audio_context, config.audio_margin, shape.max_source_positions)
    return TrainingJob(
        shape,
        finetuning=config.finetuning,
        quantization=rung.quantization,
        precision=precision,
        lora_r=config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=tuple(config.target_modules),
        optim=config.optim,
        per_device_train_batch_size=rung.per_device_train_batch_size,
        gradient_accumulation_steps=rung.gradient_accumulation_steps,
        gradient_checkpointing=rung.gradient_checkpointing,
        positions=context.positions(rung.max_audio_len),
        label_tokens=min(label_tokens, shape.max_target_positions),
        per_device_eval_batch_size=0,
        generation_num_beams=config.generation_num_beams,
        generation_tokens=config.generation_max_length,
        aligns=alignment_steps(config) > 0,
        ranks=config.processes,
        zero_stage=3 if config.fsdp else ZERO_STAGES.get(config.deepspeed or "", 0),
    )


def below(rung: Rung, *, may_quantize: bool, takes: Callable[[Rung], int] | None = None) -> Iterator[Rung]:
    """The rungs below this one, each with all that those before it changed.

    With `takes`, the bytes of a rung, 8-bit weights only where they take fewer: often they take more, in activations.
    """
    if may_quantize and rung.quantization == "none":
        eight = replace(rung, quantization="8bit")
        if takes is None or takes(eight) < takes(rung):
            rung = eight
            yield rung
    for batch in smaller_batches(rung.per_device_train_batch_size):
        times = rung.effective_batch // batch
        rung = replace(rung, per_device_train_batch_size=batch, gradient_accumulation_steps=times)
        yield rung
    if not rung.gradient_checkpointing:
        rung = replace(rung, gradient_checkpointing=True)
        yield rung
    while rung.max_audio_len * SHORTER >= SHORTEST_SECONDS:
        rung = replace(rung, max_audio_len=round(rung.max_audio_len * SHORTER, 1))
        yield rung


def smaller_batches(batch: int) -> Iterator[int]:
    """Divisors of `batch` below it, about halving: 8 gives 4, 2, 1."""
    for size in range(batch // 2, 0, -1):
        if batch % size == 0:
            yield size
            batch = size
