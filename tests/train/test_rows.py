"""Which recordings are trained on and which are held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from resonance.config import TrainConfig
from resonance.train.rows import Rows, read_rows


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Forty recordings of 1 to 4 seconds."""
    rows = []
    for i in range(40):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(16_000 * (1 + i % 4), dtype=np.float32), 16_000)
        rows.append({"audio": f"{i}.wav", "text": f"text {i}"})
    (tmp_path / "labels.json").write_text(json.dumps(rows))
    return tmp_path / "labels.json"


def rows(labels: Path, **settings: object) -> Rows:
    given = {"train_file": labels, "output_dir": "run", "validation_split": 0.25, **settings}
    return read_rows(TrainConfig.model_validate(given), Console(quiet=True))


def texts(rows: list) -> set[str]:  # type: ignore[type-arg]
    return {row.text for row in rows}


def test_a_shorter_limit_puts_no_held_out_recording_into_the_training(labels: Path) -> None:
    whole, short = rows(labels), rows(labels, max_audio_len=3)
    assert len(short.train) < len(whole.train) and len(short.held_out) < len(whole.held_out)
    assert texts(short.train) <= texts(whole.train) and texts(short.held_out) <= texts(whole.held_out)


def test_what_is_left_below_a_limit_is_what_reading_with_it_gives(labels: Path) -> None:
    cut, read = rows(labels).up_to(3), rows(labels, max_audio_len=3)
    assert texts(cut.train) == texts(read.train) and texts(cut.held_out) == texts(read.held_out)
