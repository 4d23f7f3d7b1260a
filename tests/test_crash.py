"""Killed at any moment and continued, a training ends with the same bits as one that never was.

Trainings are forked from a server that has imported everything (`forked.py`), so that many can be killed.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import crash_training
from forked import SERVER
from resonance.model.checkpoints import COMPLETE_FILE
from resonance.model.runs import RunFolder, read_events

pytestmark = pytest.mark.skipif(os.name == "nt", reason="forks and kills as Unix does")
KILLS = 20
SECONDS_AT_MOST = 120
SETTINGS: dict[str, Any] = {
    "language": "en",
    "max_steps": 90,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_steps": 3,
    "load_best_model_at_end": False,
    "eval_strategy": "no",
    "learning_rate": 0.01,
    "lora_dropout": 0.2,
    "lora_r": 4,
    "dataloader_num_workers": 0,
    "apply_spec_augment": True,
    "speed_perturbation": 0.1,
    "context_alignment_steps": 2,
    "extra": {"use_cpu": True},
}


def start(given: dict[str, Any], out: Path) -> BaseProcess:
    process = SERVER.Process(
        target=crash_training.train,
        args=({**given, "output_dir": out, "resume": out.exists()}, str(out.with_suffix(".log"))),
    )
    process.start()
    return process


def result(out: Path) -> dict[str, bytes]:
    folder = out / "adapter"
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def saving(out: Path, known: set[str]) -> bool:
    """Whether a checkpoint is being written that was not there before."""
    return any(
        folder.name not in known and not (folder / COMPLETE_FILE).exists()
        for folder in (out / "checkpoints").glob("checkpoint-*")
    )


def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_bits(
    recordings: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    given = {"train_file": recordings(14), "model_name_or_path": str(tiny_model), **SETTINGS}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = start(given, undisturbed)
    process.join(SECONDS_AT_MOST)
    assert process.exitcode == 0, undisturbed.with_suffix(".log").read_text()

    chance = random.Random(7)
    kills = kills_while_saving = 0
    while kills < KILLS and not RunFolder(killed).result:
        process = start(given, killed)
        if kills % 2:  # while a checkpoint is written
            known = {folder.name for folder in (killed / "checkpoints").glob("checkpoint-*")}
            while process.is_alive() and not saving(killed, known):
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.03))
            kills_while_saving += saving(killed, known)
        else:  # at any moment from its beginning to some steps after the first
            began = time.monotonic()
            latest = RunFolder(killed).latest_checkpoint()
            while process.is_alive() and RunFolder(killed).latest_checkpoint() == latest:
                if chance.random() < 0.02:
                    break
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.1 * (time.monotonic() - began)))
        kills += process.is_alive()
        process.kill()
        process.join(SECONDS_AT_MOST)
    assert kills >= KILLS // 2 and kills_while_saving >= 3, (kills, kills_while_saving)

    if not RunFolder(killed).result:
        process = start(given, killed)
        process.join(SECONDS_AT_MOST)
        assert process.exitcode == 0, killed.with_suffix(".log").read_text()
    assert result(killed) == result(undisturbed) and result(killed)
    steps, others = (
        [(row["step"], row["loss"]) for row in read_events(out / "events.jsonl") if "loss" in row]
        for out in (undisturbed, killed)
    )
    assert steps == others and [step for step, _loss in steps] == list(range(1, 91))


Run = tuple[dict[str, object], Path]  # what a training was given, and its folder


@pytest.fixture(scope="module")
def nine_steps(
    recordings_in: Callable[[Path, int], Path], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    folder = tmp_path_factory.mktemp("nine-steps")
    rows = recordings_in(folder / "recordings", 14)
    given = {"train_file": rows, "model_name_or_path": str(tiny_model), **SETTINGS, "max_steps": 9}
    process = start(given, folder / "whole")
    process.join(SECONDS_AT_MOST)
    assert process.exitcode == 0
    return given, folder / "whole"


@pytest.mark.parametrize("damage", ["changed", "cut", "marker"])
def test_a_torn_checkpoint_is_passed_over_with_a_warning(damage: str, nine_steps: Run, tmp_path: Path) -> None:
    given, whole = nine_steps
    torn = tmp_path / "torn"
    shutil.copytree(whole, torn)
    (torn / "adapter").rename(tmp_path / "away")
    newest = torn / "checkpoints" / "checkpoint-9"
    file = newest / "optimizer.pt"
    if damage == "changed":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (newest / COMPLETE_FILE).write_text("{")
    process = start(given, torn)
    process.join(SECONDS_AT_MOST)
    said = torn.with_suffix(".log").read_text()
    assert process.exitcode == 0, said
    assert "checkpoint-9" in said and ("optimizer.pt has changed" if damage == "changed" else "not written to") in said
    assert result(torn) == result(whole) and result(whole)
    assert json.loads((newest / COMPLETE_FILE).read_text())  # written again
