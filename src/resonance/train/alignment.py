"""Before training: teach the encoder to hear at the length of the audio what it hears in 30 s.

Whisper learned on windows of 30 s, and its encoder answers differently when the silence behind a phrase is missing. With
few recordings, most of a training is then spent on winning back what the shorter context took. The answer for 30 s is
known, however: the base model gives it for any recording, without a transcript. So the trainable encoder weights are first
fitted to it. (The FUTO whisper-acft study fits shorter contexts the same way, by the mean squared error of hidden states.)

Measured on whisper-base's encoder, speaker F03 of TORGO, 83 recordings never seen: understood exactly 59.0 % at 30 s,
53.0 % at 0.6 s behind the speech, 59.0 % there after 80 steps with LoRA on q_proj and v_proj, 60.2 % with all-linear.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from resonance.data.audio import read_audio
from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.data.manifest import Utterance
from resonance.model.precision import DTYPES, Precision
from resonance.transcribe.decoding import unwrap
from resonance.units import ALIGNED_SECONDS

WARMUP_STEPS = 10
LEARNING_RATE = {"lora": 1e-3, "full": 1e-4}


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean squared error of encoder outputs against those for the full window, in units of their variance."""

    before: float
    after: float


@dataclass(frozen=True, slots=True)
class _Batch:
    features: torch.Tensor  # [batch, n_mels, frames]
    target: torch.Tensor  # float16 [batch, frames / 2, d_model]: the outputs for the full window, as far as they go


def trainable_encoder(model: Any) -> list[torch.nn.Parameter]:
    """The encoder's weights that training changes: LoRA matrices, its own, or none."""
    return [weight for weight in unwrap(model).model.encoder.parameters() if weight.requires_grad]


def align_audio_context(
    model: Any,
    rows: Sequence[Utterance],
    context: AudioContext,
    n_mels: int,
    *,
    steps: int,
    batch_size: int,
    at_once: int,
    learning_rate: float,
    precision: Precision,
    seed: int,
    on_step: Callable[[], None] = lambda: None,
) -> Difference:
    """Fit `trainable_encoder(model)` at `context` to what `model` gives for the full window now; a few batches of `rows`.

    `model` must not have been trained yet: its own outputs are the targets. Of `rows`, a random choice of at most
    ALIGNED_SECONDS is used. One update sees `batch_size` of them, `at_once` of them at a time: that decides the memory, and
    nothing else. The same seed gives the same weights, and the global random state is left alone.
    """
    encoder = unwrap(model).model.encoder
    weights = trainable_encoder(model)
    device = encoder.conv1.weight.device
    chance = random.Random(seed)
    mode = model.training
    model.eval()  # dropout would blur the targets, and is not what is to be learnt

    def autocast() -> torch.autocast:
        # New for every pass: autocast keeps its 16-bit copies of the weights until it ends, whatever is learnt meanwhile.
        return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")

    def mean_difference() -> float:
        with torch.no_grad():
            parts = (part for batch in batches for part in _differences(encoder, batch, at_once, autocast))
            return sum(map(float, parts)) / len(batches)

    with autocast():
        batches = _batches(encoder, _choose(rows, chance), context, n_mels, batch_size)
    before = mean_difference()
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / steps)
    )
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    order: list[_Batch] = []
    for _step in range(steps):
        order = order or chance.sample(batches, len(batches))
        optimizer.zero_grad()
        for loss in _differences(encoder, order.pop(), at_once, autocast):
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        on_step()
    after = mean_difference()
    model.zero_grad()
    model.train(mode)
    return Difference(before, after)


def _choose(rows: Sequence[Utterance], chance: random.Random) -> list[Utterance]:
    """Random rows up to ALIGNED_SECONDS, at least one, the shortest first."""
    chosen, seconds = list[Utterance](), 0.0
    for row in chance.sample(list(rows), len(rows)):
        seconds += row.duration or 0.0
        if chosen and seconds > ALIGNED_SECONDS:
            break
        chosen.append(row)
    return sorted(chosen, key=lambda row: row.duration or 0.0)


def _batches(
    encoder: Any, rows: Sequence[Utterance], context: AudioContext, n_mels: int, batch_size: int
) -> list[_Batch]:
    """Rows of similar length together, with their targets. One row at a time at 30 s: that takes the least memory."""
    device, dtype = encoder.conv1.weight.device, encoder.conv1.weight.dtype
    full = AudioContext("full", 0.0, context.window_positions)
    batches = []
    for first in range(0, len(rows), batch_size):
        clips = [read_audio(row.audio, row.start, row.end) for row in rows[first : first + batch_size]]
        features = batch_features(clips, context, n_mels).to(device, dtype)
        positions = features.shape[-1] // 2
        with torch.no_grad():
            targets = [
                encoder(batch_features([clip], full, n_mels).to(device, dtype)).last_hidden_state[0, :positions]
                for clip in clips
            ]
        batches.append(_Batch(features, torch.stack(targets).to(torch.float16)))
    return batches


def _differences(
    encoder: Any, batch: _Batch, at_once: int, autocast: Callable[[], torch.autocast]
) -> Iterator[torch.Tensor]:
    """The difference of a batch in parts that add up to it, `at_once` clips each."""
    scale = batch.target.numel() * batch.target.float().var()
    for features, target in zip(torch.split(batch.features, at_once), torch.split(batch.target, at_once), strict=True):
        with autocast():
            hidden = encoder(features).last_hidden_state.float()
        yield torch.nn.functional.mse_loss(hidden, target.float(), reduction="sum") / scale
