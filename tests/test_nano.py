"""The model and the recordings that come with the package: train, evaluate, transcribe and resume, by what is understood."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from resonance.cli import plain_console, run
from resonance.demo import SPEAKER, demo
from resonance.model.checkpoints import COMPLETE_FILE
from resonance.model.runs import RunFolder

FLAGS = [
    "--target_modules=all-linear",
    "--max_steps=40",
    "--save_steps=10",
    "--validation_split=0",
    "--dataloader_num_workers=0",
    "--logging_steps=20",
    "--seed=7",
]


def train(rows: Path, out: Path, *flags: str) -> int:
    command = ["train", "--model_name_or_path", "resonance/nano", "--train_file", str(rows), "--output_dir", str(out)]
    return run([*command, *FLAGS, *flags])


def rows_of(name: str) -> list[dict[str, Any]]:
    rows = json.loads((SPEAKER / name).read_text(encoding="utf-8"))
    return [row | {"audio": str(SPEAKER / row["audio"])} for row in rows]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of 40 steps on the demo speaker's 60 training recordings."""
    out = tmp_path_factory.mktemp("nano") / "run"
    assert train(SPEAKER / "train.json", out) == 0
    return out


@pytest.fixture(scope="module")
def report(learned: Path) -> dict[str, Any]:
    assert run(["evaluate", "--model_path", str(learned), "--test_file", str(SPEAKER / "test.json")]) == 0
    found: dict[str, Any] = json.loads((learned / "report.json").read_text(encoding="utf-8"))
    return found


def test_a_speaker_the_model_hardly_understands_is_understood_after_training(report: dict[str, Any]) -> None:
    before, after = (report["groups"]["all"][model]["exact_phrase_accuracy"] for model in ("base", "tuned"))
    assert before["value"] < 0.4
    assert after["value"] >= before["value"] + 0.2
    assert report["verdict"] == "better"


def test_trained_phrases_and_new_ones_are_told_apart(report: dict[str, Any]) -> None:
    trained = {row["text"] for row in rows_of("train.json")}
    seen = [row for row in rows_of("test.json") if row["text"] in trained]
    assert report["groups"]["seen"]["utterances"] == len(seen) > 0
    assert report["groups"]["new"]["utterances"] == len(rows_of("test.json")) - len(seen) > 0


def test_the_transcript_on_the_screen_is_what_was_said(
    learned: Path, report: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    understood = next(row for row in report["rows"] if row["seen"] and row["tuned"]["exact"])
    capsys.readouterr()
    assert run(["transcribe", "--model_path", str(learned), "--audio_path", understood["audio"]]) == 0
    assert understood["reference"] in capsys.readouterr().out


def test_both_languages_are_told_apart_without_being_named(learned: Path, tmp_path: Path) -> None:
    rows = rows_of("test.json")
    (tmp_path / "list.txt").write_text("\n".join(row["audio"] for row in rows), encoding="utf-8")
    out = tmp_path / "texts.json"
    command = ["transcribe", "--model_path", str(learned), "--audio_list", str(tmp_path / "list.txt")]
    assert run([*command, "--output_file", str(out)]) == 0
    heard = json.loads(out.read_text(encoding="utf-8"))
    right = sum(answer["language"] == row["language"] for answer, row in zip(heard, rows, strict=True))
    assert right >= 0.9 * len(rows)


def test_a_run_that_was_killed_on_its_way_ends_understanding_the_same(
    learned: Path, tmp_path: Path, report: dict[str, Any]
) -> None:
    broken = tmp_path / "run"
    shutil.copytree(learned, broken)
    shutil.rmtree(broken / "adapter")
    (broken / "checkpoints" / "checkpoint-40" / COMPLETE_FILE).unlink()
    latest = RunFolder(broken).latest_checkpoint()
    assert latest and latest.name == "checkpoint-30"
    assert train(SPEAKER / "train.json", broken, "--resume") == 0
    out = tmp_path / "texts.json"
    audio = [row["audio"] for row in report["rows"]]
    (tmp_path / "list.txt").write_text("\n".join(audio), encoding="utf-8")
    command = ["transcribe", "--model_path", str(broken), "--audio_list", str(tmp_path / "list.txt")]
    assert run([*command, "--output_file", str(out)]) == 0
    texts = [row["text"] for row in json.loads(out.read_text(encoding="utf-8"))]
    assert texts == [row["tuned"]["text"] for row in report["rows"]]


def test_the_demo_runs_the_commands_that_it_shows_and_goes_on_where_it_was_stopped(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "示例 demo"
    shutil.copytree(learned, out / "run")  # as if an earlier demo had trained
    ran: list[list[str]] = []

    def remember(command: list[str]) -> int:
        ran.append(command)
        return run(command) if command[0] != "train" else 0

    assert demo(out, remember, plain_console()) == 0
    shown = capsys.readouterr().out
    assert [command[0] for command in ran] == ["data", "plan", "train", "evaluate", "transcribe"]
    assert "--resume" in ran[2]
    assert "openai/whisper-small" in shown and "report.html" in shown
    assert (out / "run" / "report.html").is_file()
    assert sorted(p.name for p in (out / "recordings").iterdir()) == sorted(p.name for p in SPEAKER.iterdir())


def test_the_demo_stops_at_the_first_step_that_fails_with_its_exit_code(tmp_path: Path) -> None:
    codes = iter([0, 143])
    assert demo(tmp_path / "demo", lambda command: next(codes), plain_console()) == 143


def test_a_demo_that_cannot_write_says_where_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way")
    assert run(["demo", "--output_dir", str(tmp_path / "file" / "demo")]) == 1
    said = capsys.readouterr().err
    assert "--output_dir" in said and "file" in said
