"""After a training: what it took, beside what a plan would have said."""

from __future__ import annotations

import statistics
from dataclasses import replace

from resonance.config import TrainConfig
from resonance.model.rungs import rung_of
from resonance.model.runs import RunFolder
from resonance.model.sizes import WhisperShape
from resonance.plan import calibration, devices
from resonance.plan.choose import plan_for
from resonance.plan.recordings import lengths
from resonance.train.ladder import FITTED_FILE
from resonance.train.rows import Rows
from resonance.train.trainer import WhisperTrainer, peak_memory

_learnt = False  # in this process


def learn(config: TrainConfig, rows: Rows, shape: WhisperShape, trainer: WhisperTrainer, run: RunFolder) -> None:
    """Remember a training that is done, unless its figures are not its own.

    They are not where memory ran out before, where another training ran in this process (both leave their peak behind), or
    where several processes trained together.
    """
    global _learnt
    if _learnt or trainer.args.world_size > 1 or (run.path / FITTED_FILE).is_file():
        return
    _learnt = True
    on = trainer.args.device
    device = devices.find()
    if device.kind != on.type:
        device = replace(devices.processor(), here=True)
    speeds = [row["samples_per_second"] for row in trainer.state.log_history if row.get("samples_per_second")]
    if len(speeds) < 2 or device.kind != on.type:
        return
    measured = lengths(rows, None)
    rung = rung_of(config, measured.longest)
    # What would have been said without this file.
    plan = plan_for("", shape, config, replace(device, here=False), measured, rung)
    calibration.remember(
        calibration.Past(
            device.name,
            config.finetuning,
            config.quantization,
            shape.d_model,
            plan.needed,
            peak_memory(on),
            plan.duration.training / plan.steps,
            rung.effective_batch / statistics.median(speeds[1:]),
        )
    )
