"""The log of a run, as other programs read it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from resonance.model.runs import read_events
from resonance.train.progress import append_event


def test_a_loss_that_is_no_number_leaves_a_log_that_strict_readers_take(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_event(path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "learning_rate": 1e-3})
    append_event(path, {"step": 2, "loss": 0.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert rows == [{"step": 1, "loss": None, "grad_norm": None, "learning_rate": 1e-3}, {"step": 2, "loss": 0.5}]
    assert read_events(path) == rows
