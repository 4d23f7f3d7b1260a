"""Memory divided among processes: the same result, in the same folder, as from one process."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from resonance.config import TrainConfig
from resonance.errors import ConfigError, MissingExtraError
from resonance.model.load import load_whisper
from resonance.train.sharding import deepspeed_settings, sharding_arguments

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
TOLERANCE = 1e-4


def config(**given: Any) -> TrainConfig:
    return TrainConfig.model_validate({"train_file": "labels.json", "output_dir": "run", **given})


def train(folder: Path, *arguments: str) -> Path:
    command = [sys.executable, "-m", "resonance", "train", *arguments, "--output_dir", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="DeepSpeed is not installed (it is built from source: docs/how-to)")
@pytest.mark.parametrize("finetuning", ["lora", "full"])
def test_zero_1_2_and_3_train_and_save_what_one_process_does(
    finetuning: str, uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path
) -> None:
    given = ["--train_file", str(uneven_labels(12)), "--model_name_or_path", str(tiny_model), "--use_cpu"]
    given += ["--max_steps=4", "--eval_steps=2", "--learning_rate=0.01", "--language=en", "--lora_dropout=0"]
    given += [f"--finetuning={finetuning}", "--validation_split=0.2", "--optim=sgd", "--dataloader_num_workers=0"]
    alone = train(tmp_path / "alone", *given, "--per_device_train_batch_size=4")
    for stage in ("zero1", "zero2", "zero3"):
        two = ["--nproc=2", "--per_device_train_batch_size=2", "--deepspeed", stage]
        divided = train(tmp_path / stage, *given, *two)
        name = "adapter/adapter_model.safetensors" if finetuning == "lora" else "model/model.safetensors"
        wanted, found = load_file(alone / name), load_file(divided / name)
        assert wanted.keys() == found.keys()
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, rtol=0, atol=TOLERANCE, msg=f"{stage} {key}")
        names = sorted(file.name for file in (alone / name).parent.iterdir())
        assert names == sorted(file.name for file in (divided / name).parent.iterdir())
        load_whisper(str(divided / "model"), device=torch.device("cpu")) if finetuning == "full" else None
        for lost in ("checkpoint-4", None):  # stopped in the middle, then between the last step and the result
            if lost:
                shutil.rmtree(divided / "checkpoints" / lost)
            shutil.rmtree((divided / name).parent)
            train(divided, *given, *two, "--resume")
            for key, weight in wanted.items():
                torch.testing.assert_close(load_file(divided / name)[key], weight, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_settings_for_deepspeed_leave_to_the_training_what_the_training_says(stage: int) -> None:
    found = deepspeed_settings(config(deepspeed=f"zero{stage}"))
    assert found["zero_optimization"]["stage"] == stage
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        assert found[name] == "auto"
    assert ("stage3_gather_16bit_weights_on_model_save" in found["zero_optimization"]) == (stage == 3)


def test_a_file_of_ones_own_is_taken_with_the_trainings_batch(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 8}))
    found = deepspeed_settings(config(deepspeed=str(file), per_device_train_batch_size=8))
    assert found["zero_optimization"] == {"stage": 2} and found["train_micro_batch_size_per_gpu"] == "auto"
    with pytest.raises(ConfigError, match=r"train_micro_batch_size_per_gpu is 8, but the training says 4"):
        deepspeed_settings(config(deepspeed=str(file), per_device_train_batch_size=4))


@pytest.mark.parametrize(("content", "said"), [(None, "neither zero1"), ("{", "is not JSON"), ("[]", "JSON object")])
def test_a_file_that_cannot_be_used_is_named(content: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=said) as caught:
        deepspeed_settings(config(deepspeed=str(file)))
    assert "ds.json" in str(caught.value)


@pytest.mark.skipif(HAS_DEEPSPEED, reason="DeepSpeed is installed")
def test_deepspeed_that_is_missing_is_asked_for() -> None:
    with pytest.raises(MissingExtraError, match=r"resonance-asr\[deepspeed\]"):
        sharding_arguments(config(deepspeed="zero2"), on_cpu=True)


def test_fsdp_on_a_processor_is_refused_because_it_would_do_nothing() -> None:
    with pytest.raises(ConfigError, match="needs GPUs"):
        sharding_arguments(config(fsdp=True), on_cpu=True)
    assert sharding_arguments(config(fsdp=True), on_cpu=False)["fsdp"] is True


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"deepspeed": "zero2", "fsdp": True}, "deepspeed and fsdp"),
        ({"deepspeed": "zero3", "quantization": "8bit"}, "does not go with"),
        ({"fsdp": True, "quantization": "4bit"}, "does not go with"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config(**given)
