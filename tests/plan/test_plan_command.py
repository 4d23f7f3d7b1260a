"""`resonance plan` and `train --auto` as a user and a program see them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from resonance.cli import run
from resonance.config import TrainConfig
from resonance.config_io import load_yaml, parse
from resonance.model.runs import RunFolder
from resonance.plan import devices

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plan on every machine."""
    monkeypatch.setattr(devices, "_nvidia", lambda: None)
    monkeypatch.setattr(devices, "_apple", lambda: None)


def test_the_plan_is_what_train_takes(
    recordings: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels, file = recordings(12), tmp_path / "计划" / "plan.yaml"
    given = ["--train_file", str(labels), "--model_name_or_path", str(tiny_model), "--max_steps=2", "--lora_r=8"]
    assert run(["plan", *given, "--logging_steps=1", "--write", str(file)]) == 0
    command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert command == ["resonance", "train", "--config", str(file), "--output_dir", "run"]
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert values["lora_r"] == 8 and values["per_device_train_batch_size"] == 8
    assert "write" not in values and "output_dir" not in values
    out = tmp_path / "run"
    assert run(["train", "--config", str(file), "--output_dir", str(out), "--context_alignment_steps=0"]) == 0
    trained = load_yaml(TrainConfig, RunFolder(out).path / "config.yaml")
    assert trained.target_modules == values.pop("target_modules").split(",")
    assert {name: getattr(trained, name) for name in values if name != "train_file"} == {
        name: value for name, value in values.items() if name != "train_file"
    }


def test_auto_chooses_what_is_left_open_and_keeps_the_rest(
    recordings: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["--train_file", str(recordings(6)), "--model_name_or_path", str(tiny_model), "--output_dir", str(out)]
    fast = ["--max_steps=1", "--dataloader_num_workers=0", "--context_alignment_steps=0", "--validation_split=0"]
    assert run(["train", "--auto", *given, *fast]) == 0
    shown = capsys.readouterr().out
    assert "as you gave it" in shown and "Predicted time" in shown
    settings = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    assert settings["per_device_train_batch_size"] == 4  # of six recordings
    assert settings["max_steps"] == 1 and settings["auto"] is False


def test_auto_leaves_a_run_that_has_begun_as_it_is(
    recordings: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["--train_file", str(recordings(6)), "--model_name_or_path", str(tiny_model), "--output_dir", str(out)]
    fast = ["--dataloader_num_workers=0", "--context_alignment_steps=0", "--validation_split=0"]
    assert run(["train", "--auto", *given, *fast, "--max_steps=1"]) == 0
    capsys.readouterr()
    assert run(["train", "--auto", "--output_dir", str(out), "--resume", "--max_steps=2"]) == 0
    assert "Predicted time" not in capsys.readouterr().out


def test_settings_that_would_disagree_are_not_planned(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    assert run(["plan", "--hours=5", "--gpu_memory=8GB", "--save_steps=100", "--write", str(file)]) == 0
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert values["save_steps"] % values["eval_steps"] == 0


def test_programs_get_one_json_object_on_stdout(
    recordings: Callable[..., Path], tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--train_file", str(recordings(12)), "--model_name_or_path", str(tiny_model), "--gpu", "T4", "--json"]
    assert run(["plan", *given]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted_peak_bytes"] == sum(found["memory"].values())
    assert found["predicted_seconds"] > 0 and found["fits"]
    assert found["settings"]["precision"] == "fp16"  # a T4 has no bf16
    assert set(found["reasons"]) == set(found["settings"])
    flags = [f"--{name}={value}" for name, value in found["settings"].items()]
    parse(TrainConfig, [*flags, "--train_file=labels.json", "--output_dir=run"], "resonance train")


def test_prices_are_the_users_and_currencies_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("- {name: 学校机房, gpu: RTX 3090, per_hour: 3, currency: CNY}\n", encoding="utf-8")
    assert run(["plan", "--hours=1", "--gpu_memory=8GB", "--prices", str(prices), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["costs"]
    assert [(cost["name"], cost["currency"]) for cost in found] == [("学校机房", "CNY")]
    assert found[0]["amount"] == pytest.approx(3 * found[0]["seconds"] / 3600, abs=1e-4)
    prices.write_text("- {name: x, gpu: RTX 3090, per_hour: cheap, currency: CNY}\n", encoding="utf-8")
    assert run(["plan", "--hours=1", "--gpu_memory=8GB", "--prices", str(prices)]) == 2
    assert "entry 1 needs gpu, per_hour" in capsys.readouterr().err


def test_a_card_that_is_too_small_ends_with_what_would_fit_and_what_to_rent(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--hours=1", "--clip_seconds=30", "--model_name_or_path=openai/whisper-large-v3", "--gpu_memory=1GB"]
    assert run(["plan", *given]) != 0
    said = capsys.readouterr().err
    assert "openai/whisper-large-v3 needs at least" in said and "openai/whisper-" in said.split("needs")[1]
    assert "It fits on" in said and "an hour" in said


def test_a_long_recording_among_short_ones_is_named(
    recordings: Callable[..., Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    import soundfile

    labels = recordings(12)
    rows = json.loads(labels.read_text(encoding="utf-8"))
    soundfile.write(labels.parent / "long.wav", np.zeros(16_000 * 28, dtype=np.float32), 16_000)
    labels.write_text(json.dumps([*rows, {"audio": "long.wav", "text": "long"}]), encoding="utf-8")
    given = ["--train_file", str(labels), "--model_name_or_path", str(tiny_model), "--validation_split=0"]
    assert run(["plan", *given]) == 0
    assert "the longest is 28.0 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--hours=1", "--model_name_or_path=模型/whisper"], "its size is not known"),
        (["--hours=1", "--clip_seconds=20", "--max_audio_len=10"], "no recording would be left"),
        (["--hours=1", "--train_file=labels.json"], "Keep one"),
        (["--hours=1", "--gpu_memory=lots"], "--gpu_memory is 'lots'"),
        (["--hours=1", "--gpu=RTX 9090"], "RTX 4090"),
        (["--hours=1", "--model_name_or_path=somebody/whisper-own"], "its size is not known"),
        ([], "train_file is needed"),
    ],
)
def test_what_cannot_be_planned_is_said(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", *flags]) != 0
    assert said in capsys.readouterr().err


def test_planning_never_loads_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from resonance.cli import run\n"
        "assert run(['plan', '--hours=1', '--gpu_memory=8GB', '--json']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was loaded'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
