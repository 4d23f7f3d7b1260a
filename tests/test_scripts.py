"""Commands from older notes run unchanged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def finetune() -> ModuleType:
    return load("whisper_lora_finetune")


@pytest.fixture
def passed_on(finetune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line that the script hands to `resonance`."""
    seen: list[str] = []

    def run(argv: list[str]) -> int:
        seen[:] = argv
        return 0

    monkeypatch.setattr(finetune, "run", run)
    return seen


def settings(argv: list[str]) -> Any:
    from resonance.config import TrainConfig
    from resonance.config_io import parse

    assert argv[0] == "train"
    return parse(TrainConfig, argv[1:], "resonance train")


def test_training_and_transcribing_with_every_flag_of_the_notes(
    finetune: ModuleType,
    tiny_model: Path,
    recordings: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import transformers.integrations
    from transformers import TrainerCallback

    wandb_starts = []

    class Wandb(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wandb_starts.append(os.environ["WANDB_PROJECT"])

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there" if name == "wandb" else real(name))
    monkeypatch.setattr(transformers.integrations, "WandbCallback", Wandb)
    monkeypatch.setenv("WANDB_PROJECT", "")
    train, validation = recordings(20, name="train"), recordings(4, name="validation")
    output = tmp_path / "my output"
    # fmt: off
    code = finetune.main([
        "--model_name_or_path", str(tiny_model), "--cache_dir", str(tmp_path / "cache"),
        "--train_file", str(train), "--validation_file", str(validation),
        "--max_train_samples", "12", "--max_eval_samples", "3", "--output_dir", str(output),
        "--num_train_epochs", "2", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2",
        "--learning_rate", "5e-4", "--warmup_steps", "500", "--logging_steps", "1", "--save_steps", "3",
        "--eval_steps", "3", "--fp16", "--gradient_checkpointing", "--lora_r", "4", "--lora_alpha", "16",
        "--lora_dropout", "0.05", "--use_wandb", "--wandb_project", "my-whisper-project",
    ])
    # fmt: on
    assert code == 0
    assert wandb_starts == ["my-whisper-project"]
    info = json.loads((output / "adapter" / "resonance.json").read_text(encoding="utf-8"))
    assert info["data"]["train_rows"] == 12
    assert info["data"]["eval_rows"] == 3
    assert info["scores"]["utterances"] == 3
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["r"] == 4
    events = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    assert max(event["step"] for event in events) == 6  # 12 recordings, 4 at a time, twice
    assert "A tenth is used" in capsys.readouterr().err
    assert any((output / "runs").iterdir())  # TensorBoard

    result = tmp_path / "results.json"
    listed = sorted((validation.parent / "audio").glob("*.wav"))[:2]
    (tmp_path / "audio_list.txt").write_text("".join(f"{path}\n" for path in listed), encoding="utf-8")
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    inference = [sys.executable, str(SCRIPTS / "whisper_lora_inference.py"), "--model_path", str(output)]
    # fmt: off
    done = subprocess.run(
        [
            *inference, "--audio_list", str(tmp_path / "audio_list.txt"), "--output_file", str(result),
            "--language", "zh", "--task", "translate", "--return_timestamps", "--device", "cpu",
        ],
        capture_output=True, text=True, check=False,
    )
    # fmt: on
    assert done.returncode == 0, done.stderr
    rows = json.loads(result.read_text(encoding="utf-8"))
    assert [row["audio_path"] for row in rows] == [str(path) for path in listed]
    assert {"text", "language", "segments"} <= rows[0].keys()
    assert rows[0]["language"] == "zh"


def test_flags_left_out_mean_what_they_meant_in_the_notes(
    finetune: ModuleType, passed_on: list[str], recordings: Callable[..., Path]
) -> None:
    assert finetune.main(["--train_file", str(recordings()), "--output_dir", "output"]) == 0
    config = settings(passed_on)
    assert (config.num_train_epochs, config.max_steps) == (3, None)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (4, 2)
    assert (config.learning_rate, config.lora_r, config.lora_alpha, config.lora_dropout) == (5e-4, 8, 32, 0.1)
    assert config.target_modules == ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
    assert (config.eval_steps, config.logging_steps) == (500, 50)


@pytest.mark.parametrize(
    ("flag", "name", "value"), [("--lora-r=64", "lora_r", 64), ("--base_model=x", "model_name_or_path", "x")]
)
def test_a_flag_that_is_given_counts_however_it_is_spelt(
    flag: str, name: str, value: object, finetune: ModuleType, passed_on: list[str], recordings: Callable[..., Path]
) -> None:
    finetune.main(["--train_file", str(recordings()), "--output_dir", "output", flag])
    assert getattr(settings(passed_on), name) == value


def test_steps_between_saves_alone_go_for_measuring_too(
    finetune: ModuleType, passed_on: list[str], recordings: Callable[..., Path]
) -> None:
    finetune.main(["--train_file", str(recordings()), "--output_dir", "output", "--save_steps", "250"])
    assert settings(passed_on).eval_steps == 250


def test_a_warm_up_that_fits_stays_as_it_is(
    finetune: ModuleType, passed_on: list[str], recordings: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--train_file", str(recordings(20)), "--output_dir", "output"]  # 18 to train on: 3 steps a pass
    finetune.main([*data, "--num_train_epochs", "100", "--warmup_steps", "299"])
    assert settings(passed_on).warmup_steps == 299
    assert capsys.readouterr().err == ""
    finetune.main([*data, "--num_train_epochs", "100", "--warmup_steps", "300"])
    assert settings(passed_on).warmup_steps == 0.1
    assert "300" in capsys.readouterr().err


def test_a_run_that_goes_on_keeps_its_own_settings(finetune: ModuleType, passed_on: list[str]) -> None:
    argv = ["--resume", "--output_dir", "output"]
    assert finetune.main(argv) == 0
    assert passed_on == ["train", *argv]


def test_a_mistake_is_told_once_before_anything_is_loaded(
    finetune: ModuleType, passed_on: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune.main(["--train_file", "x.json", "--output_dir", "output", "--lora_rank", "8"]) == 2
    assert finetune.main(["--train_file", "nowhere.json", "--output_dir", "output"]) == 1
    err = capsys.readouterr().err
    assert "--lora_rank is not a setting" in err
    assert "nowhere.json: no such file" in err
    assert passed_on == []
