"""What earlier trainings on this machine took, beside what had been predicted: `plan.calibration.json`.

A plan multiplies its memory and its time by the medians found there for the same device, method, weights and size of
model: what is fixed weighs more in a small one.
"""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from resonance.data.textfile import write_text_atomic
from resonance.errors import DataError
from resonance.model.job import TrainingJob
from resonance.plan.devices import Device

KEPT = 50  # trainings in the file, the oldest go first
USED = 5  # of the same kind, the latest
FACTORS = (0.3, 3.0)  # beyond these, something else was going on


@dataclass(frozen=True, slots=True)
class Past:
    """One training: bytes at its fullest and seconds of an optimiser step, predicted and measured."""

    device: str
    finetuning: str
    quantization: str
    d_model: int
    predicted_bytes: int
    measured_bytes: int
    predicted_step_seconds: float
    measured_step_seconds: float


@dataclass(frozen=True, slots=True)
class Factors:
    memory: float = 1.0
    time: float = 1.0
    trainings: int = 0


def file() -> Path:
    """In $RESONANCE_HOME, or in the user's cache folder."""
    home = os.environ.get("RESONANCE_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "resonance") / "plan.calibration.json"


def read() -> list[Past]:
    """All that can be read: a damaged file costs accuracy, not the plan."""
    try:
        rows = json.loads(file().read_text(encoding="utf-8"))
        names = {field.name for field in fields(Past)}
        return [Past(**row) for row in rows if isinstance(row, dict) and set(row) == names]
    except (OSError, ValueError, TypeError):
        return []


def remember(past: Past) -> None:
    """Add a training. A cache folder that cannot be written is no reason for a training to fail."""
    rows = [asdict(row) for row in [*read(), past][-KEPT:]]
    try:
        write_text_atomic(file(), [json.dumps(rows, indent=1)])
    except (DataError, OSError):
        return


def factors_for(device: Device, job: TrainingJob) -> Factors:
    """Medians of measured to predicted over the latest trainings of this kind; 1 where there are none."""
    if not device.here:
        return Factors()
    same = [
        past
        for past in read()
        if (past.device, past.finetuning, past.quantization, past.d_model)
        == (device.name, job.finetuning, job.quantization, job.shape.d_model)
    ][-USED:]
    if not same:
        return Factors()
    return Factors(
        _median([past.measured_bytes / past.predicted_bytes for past in same if past.predicted_bytes]),
        _median(
            [past.measured_step_seconds / past.predicted_step_seconds for past in same if past.predicted_step_seconds]
        ),
        len(same),
    )


def _median(ratios: list[float]) -> float:
    return min(max(statistics.median(ratios or [1.0]), FACTORS[0]), FACTORS[1])
