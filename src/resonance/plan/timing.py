"""How long a training takes and what it costs: operations counted, speeds assumed or learnt from earlier runs.

A multiply-add is two operations. One layer of width d costs a position 2 * weights for its linear layers and 4 * T * d for
attention over T positions (scores and weighted sum). Backward through a layer costs as much as forward for the gradient
of its inputs, and as much again for that of its weights, which LoRA leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass

from resonance.model.sizes import WhisperShape
from resonance.plan.devices import Device

# Share of the peak that a training step reaches in matrix products. GPUs: an estimate. Processor: of CPU_CORE_FLOPS on two
# cores, 18 % with resonance/nano (160 wide, all-linear LoRA) and 42 % with whisper-tiny's shape (384, full; benchmarks/results).
EFFICIENCY = {"cuda": 0.35, "mps": 0.3, "cpu": 0.75}
SATURATING_WIDTH = {"cuda": 0, "mps": 0, "cpu": 400}  # d_model at which half of it is reached
# Rows of a matrix product at which it reaches half of that: a GPU needs thousands to be busy.
SATURATING_ROWS = {"cuda": 400, "mps": 200, "cpu": 20}
# Time from Python to the device: eager PyTorch takes ten to twenty microseconds to start an operation. A layer with LoRA on
# two linear layers starts about 50 in forward and twice that in backward, the optimiser and the clipping a few for each
# weight. Short phrases on a fast GPU cost this and not the computing. An estimate until a run has been measured.
LAUNCH_SECONDS = {"cuda": 1.5e-5, "mps": 2e-5, "cpu": 5e-6}
OPERATIONS_A_LAYER = 200
START_SECONDS = {"cuda": 25.0, "mps": 25.0, "cpu": 15.0}  # imports, loading the weights, checks
SAVE_SECONDS = 2.0
DECODE_STEP_OPERATIONS = 45  # of one decoder layer for one more token


@dataclass(frozen=True, slots=True)
class Duration:
    """Seconds of a training by what takes them."""

    training: float
    evaluation: float
    start: float

    @property
    def total(self) -> float:
        return self.training + self.evaluation + self.start

    def scaled(self, factor: float) -> Duration:
        """As long as earlier trainings took beside what was predicted for them."""
        return Duration(self.training * factor, self.evaluation * factor, self.start)


def forward_flops(shape: WhisperShape, positions: int, tokens: int) -> tuple[float, float]:
    """Operations of one clip through the encoder (`positions` long) and through the decoder (`tokens` long)."""
    encoder = (
        shape.encoder_layers
        * positions
        * (2 * sum(linear.weights for linear in shape.encoder_linears) + 4 * positions * shape.d_model)
    )
    encoder += 2 * positions * sum(shape.convolutions)
    keys = [linear for linear in shape.decoder_linears if linear.name in ("encoder_attn.k_proj", "encoder_attn.v_proj")]
    across = 2 * positions * sum(linear.weights for linear in keys)
    along = 2 * tokens * (sum(linear.weights for linear in shape.decoder_linears) - sum(k.weights for k in keys))
    attention = 4 * tokens * shape.d_model * (tokens + positions)
    decoder = shape.decoder_layers * (across + along + attention) + 2 * tokens * shape.embedding
    return float(encoder), float(decoder)


def efficiency_of(shape: WhisperShape, device: Device) -> float:
    return EFFICIENCY[device.kind] * shape.d_model / (shape.d_model + SATURATING_WIDTH[device.kind])


def step_seconds(
    shape: WhisperShape,
    device: Device,
    *,
    finetuning: str,
    quantized: bool,
    checkpointing: bool,
    batch: int,
    accumulation: int,
    positions: int,
    tokens: int,
) -> float:
    """Seconds of one optimiser step of `accumulation` batches of `batch` clips, all of that length."""
    encoder, decoder = forward_flops(shape, positions, tokens)
    passes = 2.0 if finetuning == "lora" else 3.0
    again = 1.0 if checkpointing else 0.0
    trained_encoder = 1.0 if finetuning == "frozen_encoder" else passes + again
    flops = batch * (encoder * trained_encoder + decoder * (passes + again))
    layers = shape.encoder_layers + shape.decoder_layers
    launches = layers * OPERATIONS_A_LAYER * (1.5 if quantized else 1.0) * (1.3 if checkpointing else 1.0)
    # Half of 8-bit and 4-bit products' time goes into unpacking the weights once more in each direction.
    unpacking = 1.3 if quantized else 1.0
    rows = batch * positions
    efficiency = efficiency_of(shape, device) * rows / (rows + SATURATING_ROWS[device.kind])
    computing = flops * unpacking / (device.flops * efficiency)
    return accumulation * max(computing, launches * LAUNCH_SECONDS[device.kind])


def evaluation_seconds(
    shape: WhisperShape, device: Device, *, clips: int, batch: int, positions: int, tokens: int
) -> float:
    """Seconds of transcribing `clips` and of their loss: decoding reads all decoder weights for every token."""
    if not clips:
        return 0.0
    encoder, decoder = forward_flops(shape, positions, tokens)
    batches = -(-clips // batch)
    computing = clips * 2 * (encoder + decoder) / (device.flops * efficiency_of(shape, device))
    reading = shape.decoder_parameters * (2 if device.kind == "cuda" else 4) / device.bandwidth
    launching = shape.decoder_layers * DECODE_STEP_OPERATIONS * LAUNCH_SECONDS[device.kind]
    return computing + batches * tokens * max(reading, launching)
