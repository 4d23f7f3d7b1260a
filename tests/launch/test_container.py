"""Training inside a SageMaker container: settings in, result out, stopped and started again."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from forked import Forked
from resonance.cli import run
from resonance.errors import ConfigError, ManifestError
from resonance.launch import metrics, source
from resonance.launch.container import (
    Folders,
    hyperparameters,
    read_flags,
    train_in_container,
    training_settings,
    write_failure,
)
from resonance.model.adapters import read_info
from resonance.model.runs import RunFolder, read_events

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ENTRY = ["-m", "resonance.sagemaker_entry"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="containers run Linux")
SHORT = {
    "max_steps": 4,
    "eval_steps": 2,
    "logging_steps": 1,
    "validation_split": 0.25,
    "learning_rate": 0.01,
    "dataloader_num_workers": 0,
}


def started(command: list[str], container: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=container.environment, capture_output=True, text=True, check=False, timeout=300, cwd=container.root
    )


def loss_steps(container: Any) -> list[int]:
    events = container.root / "checkpoints/events.jsonl"
    return [row["step"] for row in read_events(events) if "loss" in row] if events.exists() else []


def transcribes(model: Path, audio: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    return run(["transcribe", "--model_path", str(model), "--audio_path", str(audio), "--language", "en"]) == 0


@posix
def test_a_job_s_own_archive_trains_hands_over_the_result_and_prints_what_the_metrics_read(
    container: Any, tiny_model: Path, short_answers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    code = container.root / "code"
    with tarfile.open(fileobj=BytesIO(source.archive())) as tar:
        tar.extractall(code, filter="data")
    container.write_hyperparameters(
        model_name_or_path=tiny_model,
        metric_for_best_model="cer",
        max_eval_samples=1,
        **SHORT,
        sagemaker_region="us-east-1",
    )
    environment = {k: v for k, v in container.environment.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        ["bash", str(code / "sagemaker_torchrun.sh"), "--max_steps=5"],
        env={**environment, "RESONANCE_LANG": "zh-CN", "LANG": "zh_CN.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=container.root,
    )
    assert done.returncode == 0, done.stderr
    assert loss_steps(container) == [1, 2, 3, 4, 5]  # a flag wins over the hyper-parameter

    info = read_info(container.root / "model")
    assert info.kind == "lora" and info.settings["metric_for_best_model"] == "cer"
    audio = next((container.root / "input/data/train/audio").glob("*.wav"))
    assert transcribes(container.root / "model", audio, capsys)
    beside = {path.name for path in (container.root / "output/data").iterdir()}
    assert {"events.jsonl", "config.yaml", "runs", "data"} <= beside
    assert not {"adapter", "checkpoints", ".lock"} & beside
    assert container.failure == ""

    lines = done.stdout.splitlines()
    read = {name: [float(m[1]) for line in lines if (m := re.search(p, line))] for name, p in metrics.PATTERNS.items()}
    rows = read_events(container.root / "checkpoints/events.jsonl")
    training = [row for row in rows if "loss" in row]
    measured = [row for row in rows if "eval_loss" in row]
    assert read["train:loss"] == [round(row["loss"], 4) for row in training]
    assert read["train:learning_rate"] == pytest.approx([row["learning_rate"] for row in training], rel=0.01)
    assert read["train:samples_per_second"] == [round(row["samples_per_second"], 1) for row in training]
    assert read["train:memory_gib"] == [round(row["memory_gib"], 2) for row in training]
    assert read["train:peak_memory_gib"] == [round(row["peak_memory_gib"], 2) for row in training]
    assert read["validation:loss"] == [round(row["eval_loss"], 4) for row in measured]
    assert read["validation:cer_percent"] == [round(100 * row["eval_cer"], 1) for row in measured]
    assert read["validation:phrases_right_percent"] == [
        round(100 * row["eval_exact_phrase_accuracy"], 1) for row in measured
    ]
    assert len(measured) == 3 and len(training) == 5
    assert read["validation:wer_percent"] == read["validation:mer_percent"] == []  # the run measures one of them


@posix
@pytest.mark.parametrize(
    ("line", "said"),
    [("no-such-package-of-ours==9", "Packages could not be installed"), (None, "The container has no PyTorch")],
    ids=["package", "PyTorch"],
)
def test_a_container_that_lacks_something_says_so(line: str | None, said: str, container: Any) -> None:
    code = container.root / "code"
    with tarfile.open(fileobj=BytesIO(source.archive())) as tar:
        tar.extractall(code, filter="data")
    environment = {**container.environment, "PIP_NO_INDEX": "1"}
    if line:
        (code / "requirements.txt").write_text(line, encoding="utf-8")
    else:  # a Python without packages
        (code / "bin").mkdir()
        (code / "bin/python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n', encoding="utf-8")
        (code / "bin/python3").chmod(0o755)
        environment["PATH"] = f"{code / 'bin'}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", str(code / "sagemaker_torchrun.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert said in container.failure and said in done.stderr


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_job_that_is_interrupted_goes_on_from_its_checkpoint_in_a_new_container(
    number: int, inside: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SHORT, "max_steps": 40, "save_steps": 4, "eval_strategy": "no", "validation_split": 0}
    inside.write_hyperparameters(model_name_or_path=tiny_model, language="en", **settings)
    run_folder = RunFolder(inside.root / "checkpoints")
    process = Forked(ENTRY, out=tmp_path / "log", environment=inside.environment)
    try:
        deadline = time.monotonic() + 120
        while len(loss_steps(inside)) < 6 or run_folder.latest_checkpoint() is None:
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert code == (143 if number == signal.SIGTERM else -signal.SIGKILL), (tmp_path / "log").read_text()
    assert inside.failure == ""  # an interruption is no failure
    assert not any((inside.root / "model").iterdir())
    latest = run_folder.latest_checkpoint()
    assert latest is not None
    reached = int(latest.name.removeprefix("checkpoint-"))
    assert 4 <= reached < 40
    times = {path: path.stat().st_mtime_ns for path in latest.iterdir()}

    # SageMaker brings files back one by one: a checkpoint that came without all of them is not one.
    torn = run_folder.checkpoints / "checkpoint-39"
    torn.mkdir()
    (torn / "trainer_state.json").write_text("{}", encoding="utf-8")

    capsys.readouterr()
    assert train_in_container(run) == 0
    printed = capsys.readouterr().out
    assert loss_steps(inside) == list(range(1, 41))
    assert f"step {reached + 1}/40 " in printed and f"step {reached}/40 " not in printed
    assert {path: path.stat().st_mtime_ns for path in times if path.exists()}.items() <= times.items()
    assert read_info(inside.root / "model").settings["max_steps"] == 40


@posix
def test_the_script_and_names_of_older_notes_train_with_the_defaults_of_those_notes(
    container: Any, tiny_model: Path
) -> None:
    train = container.root / "input/data/train"
    rows = json.loads((train / "labels.json").read_text(encoding="utf-8"))
    for row in rows:
        (train / row["audio"]).rename(train / Path(row["audio"]).name)
    (train / "labels.json").unlink()
    transcripts = {Path(row["audio"]).name: row["text"] for row in rows}
    (train / "transcripts.json").write_text(json.dumps(transcripts), encoding="utf-8")
    # As ModelTrainer and older estimators write them: texts may be JSON, and AWS' own names are among them.
    container.write_hyperparameters(
        dataset_dir=json.dumps(str(train)),
        json_file='"transcripts.json"',
        language="english",
        task="transcribe",
        output_dir="/opt/ml/model",
        max_steps="2",
        eval_strategy="no",
        sagemaker_program="entry.py",
        sagemaker_job_name="x",
    )
    flags = ["--model_name_or_path", str(tiny_model), "--logging-steps", "1", "--dataloader_num_workers", "0"]
    done = started(["bash", str(SCRIPTS / "sagemaker_torchrun.sh"), *flags], container)
    assert done.returncode == 0, done.stderr
    settings = read_info(container.root / "model").settings
    assert (settings["per_device_train_batch_size"], settings["learning_rate"], settings["finetuning"]) == (
        16,
        1e-5,
        "full",
    )
    assert (settings["language"], settings["task"], settings["max_steps"]) == ("en", "transcribe", 2)
    assert (container.root / "model/model.safetensors").is_file()


def test_defaults_of_older_notes_give_way_to_what_is_given(inside: Any) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("entry", SCRIPTS / "entry.py")
    assert spec and spec.loader
    entry = module_from_spec(spec)
    spec.loader.exec_module(entry)
    assert entry.defaults([]) == entry.DEFAULTS
    assert entry.DEFAULTS["max_steps"] == "1024" and entry.DEFAULTS["model_name_or_path"] == "openai/whisper-large-v3"
    assert "model_name_or_path" not in entry.defaults(["--base-model", "x"])
    assert not {"max_steps", "warmup_steps"} & entry.defaults(["--num_train_epochs=3"]).keys()
    assert "warmup_steps" not in entry.defaults(["--max_steps", "500"])
    assert entry.defaults(["--max_steps", "501"])["warmup_steps"] == "500"


@pytest.mark.parametrize(
    ("values", "code", "said"),
    [
        ({"learn_rate": "1"}, 2, "learn_rate is not a setting"),
        ({"train_file": "nowhere.json"}, 1, "nowhere.json"),
        ({"model_name_or_path": "nobody/nothing"}, 1, "nobody/nothing"),
    ],
    ids=["setting", "data", "model"],
)
def test_why_a_job_failed_is_told_to_sagemaker(
    values: dict[str, str], code: int, said: str, inside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    inside.write_hyperparameters(language="en", max_steps=2, **values)
    assert train_in_container(run) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert said in inside.failure and inside.failure.startswith("Error: ")
    assert inside.failure.strip() in told
    assert not any((inside.root / "model").iterdir())


def test_what_libraries_print_before_an_error_does_not_hide_it(inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from resonance import finetune

    def noisy(*args: object) -> None:
        for _ in range(5_000):
            print("a warning of a library", file=sys.stderr)
        raise ManifestError("labels.json: no such file")

    monkeypatch.setattr(finetune, "read_rows", noisy)
    inside.write_hyperparameters(language="en", max_steps=2)
    assert train_in_container(run) == 1
    assert inside.failure == "Error: labels.json: no such file"


def test_a_crash_is_told_to_sagemaker_and_goes_on_as_a_crash(inside: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from resonance import finetune

    def crash(*args: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(finetune, "read_rows", crash)
    inside.write_hyperparameters(language="en", max_steps=2)
    with pytest.raises(RuntimeError):
        train_in_container(run)
    assert inside.failure == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_hyperparameters_that_cannot_be_read_are_an_error_with_the_file(inside: Any) -> None:
    (inside.root / "input/config/hyperparameters.json").write_text("[1]", encoding="utf-8")
    assert train_in_container(run) == 2
    assert "hyperparameters.json" in inside.failure


@pytest.mark.parametrize(("rank", "handed_over"), [("0", True), ("1", False)])
def test_a_job_that_was_stopped_after_its_last_step_hands_over_what_is_there_once(
    rank: str, handed_over: bool, inside: Any, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished_run, inside.root / "checkpoints", dirs_exist_ok=True)
    saved = json.loads((finished_run / "adapter/resonance.json").read_text(encoding="utf-8"))["settings"]
    inside.write_hyperparameters(model_name_or_path=saved["model_name_or_path"], **SHORT)
    monkeypatch.setenv("RANK", rank)
    assert train_in_container(run) == 0
    assert (inside.root / "model/resonance.json").is_file() == handed_over


def test_a_failure_is_cut_to_what_sagemaker_shows_and_the_first_one_stays(container: Any) -> None:
    folders = Folders.of(container.environment)
    write_failure(folders, "a" * 5000)
    write_failure(folders, "second")
    assert container.failure == "a" * 1024


def test_settings_come_from_the_variables_where_there_is_no_file(tmp_path: Path) -> None:
    folders = Folders.of({"SM_INPUT_CONFIG_DIR": str(tmp_path)})
    values = {
        "target_modules": ["q_proj", "v_proj"],
        "learning_rate": 1e-5,
        "gradient_checkpointing": True,
        "language": "zh",
        "per-device-train-batch-size": 16,
    }
    found = hyperparameters(folders, {"SM_HPS": json.dumps(values)})
    assert found == {
        "learning_rate": "1e-05",
        "gradient_checkpointing": "true",
        "language": "zh",
        "per_device_train_batch_size": "16",
        "target_modules": "q_proj,v_proj",
    }
    assert hyperparameters(folders, {}) == {}


def test_flags_are_read_in_every_spelling() -> None:
    argv = [
        "--max-steps",
        "7",
        "--fp16",
        "--language=zh",
        "--learning_rate",
        "-1",
        "--target_modules",
        '["fc1", "fc2"]',
    ]
    assert read_flags(argv) == {
        "max_steps": "7",
        "fp16": "true",
        "language": "zh",
        "learning_rate": "-1",
        "target_modules": "fc1,fc2",
    }
    with pytest.raises(ConfigError, match="'7' belongs to no setting"):
        read_flags(["--max_steps=7", "7"])


def test_paths_are_taken_from_the_channels_and_what_the_container_owns_stays() -> None:
    folders = Folders.of_a_job(["train"])
    data = "/opt/ml/input/data/train"
    owned = {"output_dir": "/opt/ml/checkpoints", "resume": "true"}
    assert training_settings({"output_dir": "x", "resume": "false"}, folders) == {"train_file": data, **owned}
    of_aws = {"sagemaker_program": "entry.py", "sagemaker_region": "x", "mp_parameters": "{}"}
    assert training_settings(of_aws, folders) == {"train_file": data, **owned}
    assert training_settings({"json_file": "a.json"}, folders) == {"json_file": "a.json", "dataset_dir": data, **owned}
    assert training_settings({"dataset_dir": data}, folders) == {"dataset_dir": data, "train_file": data, **owned}
    assert training_settings({"train_file": "lists/a.json"}, folders)["train_file"] == f"{data}/lists/a.json"
    everything = training_settings(
        {"base_model": "openai/whisper-small", "validation_file": "dev.json"},
        Folders.of_a_job(["train", "validation", "model"]),
    )
    assert everything["validation_file"] == "/opt/ml/input/data/validation/dev.json"
    assert everything["model_name_or_path"] == "/opt/ml/input/data/model" and "base_model" not in everything


def test_validation_and_model_channels_are_used(
    inside: Any, tiny_model: Path, recordings: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (inside.root / "input/data/model").symlink_to(tiny_model)
    recordings(4, name="validation").parent.rename(inside.root / "input/data/validation")
    inside.write_hyperparameters(language="en", **{**SHORT, "max_steps": 2})
    assert train_in_container(run) == 0
    info = read_info(inside.root / "model")
    assert (info.data["train_rows"], info.data["eval_rows"]) == (12, 4)
    assert info.base_model == str(inside.root / "input/data/model")


def test_each_of_several_machines_keeps_its_checkpoints_apart_because_all_are_mirrored_to_one_place() -> None:
    names = ("algo-1", "algo-2")
    hosts = [Folders.of({"SM_HOSTS": json.dumps(names), "SM_CURRENT_HOST": name}).checkpoints for name in names]
    assert [folder.name for folder in hosts] == list(names)
    alone = {"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-1"}
    assert Folders.of(alone).checkpoints == Folders.of({}).checkpoints == hosts[0].parent
