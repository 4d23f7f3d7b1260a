"""Plans learn from the trainings that were done on the same machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from resonance import plan_learning
from resonance.cli import run
from resonance.config import TrainConfig
from resonance.model.sizes import PUBLISHED
from resonance.plan import calibration
from resonance.plan.calibration import Past
from resonance.plan.choose import Plan, best_plan
from resonance.plan.devices import Device, processor
from resonance.plan.recordings import made_up
from resonance.units import GIBIBYTE


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESONANCE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "plan.calibration.json"


def here() -> Device:
    return replace(processor(), name="this one", memory=64 * GIBIBYTE, free=64 * GIBIBYTE, here=True)


def plan(device: Device) -> Plan:
    config = TrainConfig.model_validate({"train_file": "a", "output_dir": "b"})
    return best_plan(config, {"base": PUBLISHED["base"]}, device, made_up(0.1, 3.0))


def past(memory: float, time: float, **changes: str) -> Past:
    return replace(Past("this one", "lora", "none", 512, 1000, int(1000 * memory), 1.0, time), **changes)


def test_memory_and_time_are_corrected_by_the_median_of_earlier_trainings() -> None:
    before = plan(here())
    for time in (2.0, 2.5, 9.0):
        calibration.remember(past(1.2, time))
    after = plan(here())
    assert after.needed == pytest.approx(1.2 * before.needed, rel=1e-6)
    assert after.duration.training == pytest.approx(2.5 * before.duration.training)
    assert (before.learnt_from, after.learnt_from) == (0, 3)


def test_trainings_of_another_kind_or_machine_correct_nothing() -> None:
    before = plan(here())
    calibration.remember(past(2.0, 2.0, device="another"))
    calibration.remember(past(2.0, 2.0, finetuning="full"))
    calibration.remember(past(2.0, 2.0, quantization="8bit"))
    calibration.remember(replace(past(2.0, 2.0), d_model=64))
    assert plan(here()).needed == before.needed
    calibration.remember(past(2.0, 2.0))
    assert plan(replace(here(), here=False)).needed == before.needed  # a card that is only planned for


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '[{"device": 3}]', '{"a": []}'])
def test_a_damaged_file_costs_no_plan(home: Path, text: str) -> None:
    home.parent.mkdir(parents=True)
    home.write_text(text)
    assert calibration.read() == []
    calibration.remember(past(1.0, 1.0))
    assert len(calibration.read()) == 1


def test_a_folder_that_cannot_be_written_fails_no_training(home: Path) -> None:
    home.parent.write_text("a file in its place")
    calibration.remember(past(1.0, 1.0))
    assert calibration.read() == []


def test_old_trainings_go_first(home: Path) -> None:
    for number in range(calibration.KEPT + 3):
        calibration.remember(past(1.0, 1.0 + number))
    rows = calibration.read()
    assert len(rows) == calibration.KEPT and rows[-1].measured_step_seconds == 1.0 + calibration.KEPT + 2


@pytest.mark.usefixtures("short_answers")
def test_a_training_is_remembered_with_what_it_took(
    recordings: Callable[..., Path], tiny_model: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_learning, "_learnt", False)  # of the other tests in this process
    given = ["--train_file", str(recordings(8)), "--model_name_or_path", str(tiny_model), "--validation_split=0"]
    fast = ["--max_steps=3", "--logging_steps=1", "--dataloader_num_workers=0", "--context_alignment_steps=0"]
    for name in ("first", "second"):  # the second one's peak is not its own
        assert run(["train", *given, *fast, "--use_cpu", "--output_dir", str(tmp_path / name)]) == 0
    (row,) = json.loads(home.read_text(encoding="utf-8"))
    assert row["finetuning"] == "lora" and row["d_model"] == 32
    assert row["measured_bytes"] > 100_000_000 and row["predicted_bytes"] > 0
    assert row["measured_step_seconds"] > 0 and row["predicted_step_seconds"] > 0
