"""`resonance train` from the first command to the finished folder: the run folder's rules, and a model that learns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resonance.cli import run
from resonance.config import TrainConfig
from resonance.config_io import load_yaml
from resonance.model.adapters import read_info
from resonance.model.runs import read_events

pytestmark = pytest.mark.usefixtures("short_answers")
Train = Callable[..., int]


def events(folder: Path, key: str) -> list[int]:
    """Steps of the log rows that have `key`."""
    return [row["step"] for row in read_events(folder / "events.jsonl") if key in row]


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture
def unfinished_run(tmp_path: Path, recordings, train: Train, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 4 steps that was killed after its checkpoint of step 2, as far as its folder shows."""
    folder = tmp_path / "run"
    assert train(recordings(), folder) == 0
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-4")
    return folder


def test_a_run_leaves_a_whole_adapter_its_log_and_its_rows(finished_run: Path) -> None:
    info = read_info(finished_run / "adapter")
    assert (info.data["train_rows"], info.data["eval_rows"], info.scores["utterances"]) == (9, 3, 3)
    assert events(finished_run, "loss") == [1, 2, 3, 4]
    assert events(finished_run, "eval_wer") == [2, 4]
    assert list((finished_run / "runs").glob("events.out.tfevents*"))
    rows = [json.loads((finished_run / "data" / name).read_text()) for name in ("train.json", "held_out.json")]
    assert [len(part) for part in rows] == [9, 3]
    assert not {row["text"] for row in rows[0]} & {row["text"] for row in rows[1]}
    assert load_yaml(TrainConfig, finished_run / "config.yaml").max_steps == 4
    assert not list(finished_run.rglob("*.part"))


def test_a_second_run_into_a_finished_folder_is_refused_with_the_way_out(
    finished_run: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished_run)
    assert train(finished_run / "data" / "train.json", finished_run) == 1
    said = capsys.readouterr().err
    assert str(finished_run) in said and "--output_dir" in said and "--resume" in said
    assert snapshot(finished_run).items() >= before.items()


def test_resuming_a_finished_run_says_so_and_leaves_it_as_it_is(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(finished_run)
    assert run(["train", "--resume", "--output_dir", str(finished_run)]) == 0
    assert "nothing to continue" in capsys.readouterr().out
    assert snapshot(finished_run).items() >= before.items()


def test_a_finished_run_goes_on_with_more_steps_and_keeps_the_older_result(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(finished_run, folder)
    assert run(["train", "--resume", "--output_dir", str(folder), "--max_steps", "6"]) == 0
    assert events(folder, "loss") == [1, 2, 3, 4, 5, 6]
    assert [read_info(folder / name).settings["max_steps"] for name in ("adapter.1", "adapter")] == [4, 6]


def test_an_unfinished_run_is_not_overwritten_and_resume_alone_finishes_it(
    unfinished_run: Path, train: Train, recordings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(recordings(name="again"), unfinished_run) == 1
    said = capsys.readouterr().err
    assert "checkpoint-2" in said and "--resume" in said
    assert run(["train", "--resume", "--output_dir", str(unfinished_run)]) == 0
    assert events(unfinished_run, "loss") == [1, 2, 3, 4]
    assert (unfinished_run / "adapter" / "adapter_model.safetensors").is_file()


def test_resume_with_settings_that_shape_the_weights_is_refused_naming_them(
    unfinished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume = ["train", "--resume", "--output_dir", str(unfinished_run)]
    changed = ["--lora_r=8", "--learning_rate=0.5", "--model_name_or_path=other", "--gradient_accumulation_steps=2"]
    assert run([*resume, *changed]) == 2
    said = capsys.readouterr().err
    for part in (
        "lora_r: 16 before, 8 now",
        "learning_rate: 0.01 before, 0.5 now",
        "model_name_or_path: ",
        "per_device_train_batch_size x gradient_accumulation_steps x processes: 8 before, 16 now",
        "--output_dir",
    ):
        assert part in said
    assert "max_steps" not in said
    # The same effective batch in another shape, and everything that only watches, may change.
    harmless = (
        "--per_device_train_batch_size=4 --gradient_accumulation_steps=2 --max_steps=5 --eval_steps=1 --logging_steps=2"
    )
    assert run([*resume, *harmless.split()]) == 0
    assert events(unfinished_run, "eval_wer") == [2, 3, 4, 5]


def test_resume_with_other_recordings_is_refused_and_with_moved_ones_goes_on(
    unfinished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "elsewhere"
    (tmp_path / "recordings").rename(moved)
    resume = ["train", "--resume", "--output_dir", str(unfinished_run), "--train_file", str(moved / "labels.json")]
    rows = json.loads((moved / "labels.json").read_text())
    other = [rows[0] | {"text": "something else"}, *rows[1:]]
    (moved / "labels.json").write_text(json.dumps(other))
    assert run(resume) == 1
    said = capsys.readouterr().err
    assert "train_file" in said and "other recordings or transcripts" in said and "2 in one of the two" in said
    (moved / "labels.json").write_text(json.dumps(rows))
    assert run(resume) == 0


def test_the_last_step_is_neither_repeated_nor_added_to_when_only_the_result_is_missing(
    finished_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    kept = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    scores = read_info(folder / "adapter").scores
    shutil.rmtree(folder / "adapter")
    assert run(["train", "--resume", "--output_dir", str(folder)]) == 0
    assert events(folder, "loss") == [1, 2, 3, 4]
    assert (folder / "adapter" / "adapter_model.safetensors").read_bytes() == kept
    assert read_info(folder / "adapter").scores == scores


def test_training_stops_early_and_resuming_does_not_begin_to_count_again(
    tmp_path: Path, recordings, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    # Weights that stay as they are: the first measurement is the best, and two without improvement are the end.
    labels, folder = recordings(), tmp_path / "run"
    flags = ("--max_steps=9", "--eval_steps=1", "--early_stopping_patience=2", "--learning_rate=1e-12")
    assert train(labels, folder, *flags, "--context_alignment_steps=0") == 0
    assert events(folder, "eval_wer") == [1, 2, 3]
    shutil.rmtree(folder / "adapter")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
    assert train(labels, folder, *flags, "--context_alignment_steps=0", "--resume") == 0
    assert events(folder, "eval_wer") == [1, 2, 3]


def test_two_trainings_do_not_write_to_one_folder(
    tmp_path: Path, recordings, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    from filelock import FileLock

    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".lock"):
        assert train(recordings(), folder) == 1
    said = capsys.readouterr().err
    assert "Another training" in said and str(folder) in said


def test_nothing_held_out_is_said_and_trains(
    tmp_path: Path, recordings, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train(recordings(count=1), folder, "--validation_split=0", "--max_steps=1", "--eval_strategy=no") == 0
    said = capsys.readouterr().out
    assert "Nothing is held out" in said and "--test_file" in said
    assert read_info(folder / "adapter").scores == {}


@pytest.mark.parametrize("finetuning", ["full", "frozen_encoder"])
def test_whole_models_are_trained_saved_and_used(
    finetuning: str, tmp_path: Path, recordings, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = recordings()
    folder = tmp_path / "run"
    assert train(labels, folder, f"--finetuning={finetuning}", "--max_steps=2") == 0
    assert read_info(folder / "model").kind == "full"
    audio = next((labels.parent / "audio").iterdir())
    assert run(["transcribe", "--model_path", str(folder), "--audio_path", str(audio)]) == 0
    assert run(["evaluate", "--model_path", str(folder)]) == 0
    assert capsys.readouterr().err == ""


def test_a_plain_training_prints_no_warnings(tmp_path: Path, tiny_model: Path, recordings) -> None:
    """In a process of its own: what libraries print, not only what goes through `warnings`."""
    command = ["train", "--model_name_or_path", str(tiny_model), "--train_file", str(recordings())]
    command += ["--output_dir", str(tmp_path / "run"), "--max_steps=2", "--dataloader_num_workers=1"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, "-m", "resonance", *command], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "Warning" not in done.stdout


def test_a_person_s_recordings_train_a_model_that_understands_them(
    tmp_path: Path, shared: Path, real_model: Path
) -> None:
    """20 steps on short words of one speaker of TORGO (M03, mild dysarthria)."""
    folder = shared / "data" / "torgo"
    rows = [row for row in json.loads((folder / "labels.json").read_text()) if row["speaker"] == "M03"]
    words = [row | {"audio": str(folder / row["audio"])} for row in rows if " " not in row["text"]][:16]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(words))
    out = tmp_path / "M03"
    flags = (
        "--max_steps=20 --per_device_train_batch_size=2 --learning_rate=2e-4 --validation_split=0.15 --eval_steps=20"
    )
    command = ["train", "--model_name_or_path", str(real_model), "--train_file", str(labels), "--output_dir", str(out)]
    assert run([*command, *flags.split(), "--logging_steps=10", "--dataloader_num_workers=0"]) == 0
    trained = json.loads((out / "data" / "train.json").read_text())
    texts = tmp_path / "texts.json"
    command = ["transcribe", "--model_path", str(out), "--audio_list", str(out / "data" / "train.json")]
    assert run([*command, "--output_file", str(texts)]) == 0
    heard = {row["audio_path"]: row["text"].lower() for row in json.loads(texts.read_text())}
    right = [row["text"] for row in trained if heard[row["audio"]] == row["text"]]
    assert "ship" in right and len(right) >= 0.75 * len(trained), heard
