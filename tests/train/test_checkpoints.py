"""A run that was killed goes on and ends with the weights of one that never was."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from safetensors.torch import load_file

from resonance.config import TrainConfig
from resonance.finetune import finetune
from resonance.model.checkpoints import COMPLETE_FILE
from resonance.model.runs import RunFolder, read_events

STEPS = 8
# Everything that draws random numbers is on; 10 rows in groups of 4 make 3 steps an epoch, the last of 2 clips.
SETTINGS: dict[str, Any] = {
    "language": "en",
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_steps": 2,
    "save_total_limit": None,
    "logging_steps": 1,
    "warmup_steps": 2,
    "learning_rate": 0.01,
    "validation_split": 0.2,
    "lora_dropout": 0.2,
    "dataloader_num_workers": 2,
    "apply_spec_augment": True,
    "mask_time_prob": 0.2,
    "speed_perturbation": 0.1,
    "gain_db": 6.0,
    "extra": {"use_cpu": True},
}
torch.set_num_threads(1)  # a step takes milliseconds; threads that wait for a busy core make it a second


def run(labels: Path, model: Path, out: Path, **changes: Any) -> Path:
    given = {"train_file": labels, "model_name_or_path": str(model), "output_dir": out, **SETTINGS, **changes}
    return finetune(TrainConfig.model_validate(given), Console(quiet=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_events(out / "events.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(0)
    rows = []
    for i in range(12):
        audio = 0.1 * random.standard_normal(int(16_000 * random.uniform(0.3, 1.2)))
        soundfile.write(folder / f"{i}.wav", audio, 16_000)
        rows.append({"audio": f"{i}.wav", "text": f"row {i} " + "x" * (i % 5)})
    (folder / "labels.json").write_text(json.dumps(rows))
    return folder / "labels.json"


@pytest.fixture(scope="module")
def unbroken(labels: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training of 8 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(labels, tiny_model, out)
    return out


def killed_after(unbroken: Path, out: Path, step: int) -> Path:
    """The run folder as a kill -9 between this step's checkpoint and the next leaves it: torn checkpoint, torn log."""
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "adapter")
    for folder in (out / "checkpoints").iterdir():
        saved = int(folder.name.split("-")[1])
        if saved == step + 2:
            (folder / COMPLETE_FILE).unlink()
            (folder / "optimizer.pt").write_bytes(b"torn")
        elif saved > step:
            shutil.rmtree(folder)
    with (out / "events.jsonl").open("a") as events:
        events.write('{"step": 9, "lo')
    return out


@pytest.mark.parametrize("step", [4, 6], ids=["in the middle of an epoch", "at the end of an epoch"])
def test_a_killed_run_ends_with_the_weights_and_the_log_of_one_never_killed(
    unbroken: Path, labels: Path, tiny_model: Path, tmp_path: Path, step: int
) -> None:
    out = killed_after(unbroken, tmp_path / "run", step)
    assert RunFolder(out).latest_checkpoint() == out / "checkpoints" / f"checkpoint-{step}"
    torch.manual_seed(12345)  # whatever else this process has drawn

    run(labels, tiny_model, out, resume=True)
    for part in ("adapter", f"checkpoints/checkpoint-{STEPS}"):  # the best step and the last
        resumed, expected = weights(out / part), weights(unbroken / part)
        assert resumed.keys() == expected.keys()
        for name, weight in expected.items():
            torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6, msg=name)

    # Neither rows of the steps that were lost nor the torn line, and none twice.
    assert [s for s, _ in losses(out)] == list(range(1, STEPS + 1))
    assert [loss for _, loss in losses(out)] == pytest.approx([loss for _, loss in losses(unbroken)], abs=1e-5)
    evaluated = [row["step"] for row in read_events(out / "events.jsonl") if "eval_loss" in row]
    assert evaluated == [2, 4, 6, 8]

    # Once more: there is nothing left to do, and the result is left as it is.
    before = (out / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    run(labels, tiny_model, out, resume=True)
    assert (out / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert not (out / "adapter.1").exists()


def test_training_moves_the_weights_at_every_step(unbroken: Path) -> None:
    # What the tests above compare would be equal too if nothing were trained.
    saved = [weights(unbroken / "checkpoints" / f"checkpoint-{step}") for step in (4, 6, 8)]
    for before, after in itertools.pairwise(saved):
        assert max(float((before[name] - after[name]).abs().max()) for name in before) > 1e-4
    assert all(math.isfinite(loss) for _, loss in losses(unbroken))


def test_old_checkpoints_go_only_after_the_new_one_is_complete(labels: Path, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    changes = {"validation_split": 0.0, "eval_strategy": "no", "save_steps": 1, "save_total_limit": 2, "max_steps": 4}
    run(labels, tiny_model, out, **changes, dataloader_num_workers=0, eval_steps=1)
    folders = sorted(folder.name for folder in (out / "checkpoints").iterdir())
    assert folders == ["checkpoint-3", "checkpoint-4"]
    assert all((out / "checkpoints" / name / COMPLETE_FILE).is_file() for name in folders)
    assert not list(out.rglob("*.part*"))
