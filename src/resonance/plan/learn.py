"""After a training: what it took, beside what a plan would have said."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from resonance.config import TrainConfig
from resonance.model.rungs import Rung
from resonance.model.sizes import WhisperShape
from resonance.plan import calibration, devices
from resonance.plan.choose import plan_for
from resonance.plan.recordings import lengths
from resonance.train.rows import Rows


def learn(
    config: TrainConfig, rows: Rows, shape: WhisperShape, log: Sequence[Mapping[str, Any]], on: str, peak: int
) -> None:
    """Remember a training that is done: its `log` rows, the kind of device it ran `on` and its peak in bytes."""
    device = devices.find()
    if device.kind != on:
        device = replace(devices.processor(), here=True)
    speeds = [row["samples_per_second"] for row in log if row.get("samples_per_second")]
    if len(speeds) < 2 or device.kind != on:
        return
    measured = lengths(rows, None)
    rung = Rung(
        config.quantization,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.gradient_checkpointing,
        min(config.max_audio_len, measured.longest),
    )
    # What would have been said without this file.
    plan = plan_for("", shape, config, replace(device, here=False), measured, rung)
    calibration.remember(
        calibration.Past(
            device.name,
            config.finetuning,
            config.quantization,
            shape.d_model,
            plan.needed,
            peak,
            plan.duration.training / plan.steps,
            rung.effective_batch / statistics.median(speeds[1:]),
        )
    )
