"""The command line as a user meets it: what is refused, with which words and exit code, before anything is loaded."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from resonance.cli import plain_console, run, with_saved_settings


def test_all_mistakes_are_told_at_once_with_suggestions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = (
        "--learning_rat 3 --lora_r x --fp16=perhaps --validation_split 1.5 --eval_strategy sometimes --epochs 3 stray"
    )
    assert run(["train", "--output_dir", str(out), "--train_file", "missing.json", *flags.split()]) == 2
    said = capsys.readouterr().err
    for part in (
        "--learning_rat is not a setting. Did you mean --learning_rate?",
        "--lora_r is 'x'. It must be a whole number",
        "--fp16 is 'perhaps'",
        "--validation_split is '1.5'",
        "--eval_strategy is 'sometimes'",
        "--epochs is not a setting. Did you mean --num_train_epochs?",
        "'stray' belongs to no setting",
    ):
        assert part in said
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], "Did you mean train?"),
        (["xyzzy"], "Commands: train"),
        (["data", "chekc", "."], "Did you mean check?"),
        (["data", "check"], "path"),
        (["data", "check", ".", "--fixx", "x"], "--fixx"),
        (["transcribe", "--model_path", "m"], "audio_path"),
        (["evaluate"], "--model_path is needed"),
    ],
)
def test_a_wrong_command_exits_with_2_and_says_what_is_wanted(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert not said.out


def test_resume_takes_the_saved_settings_below_the_flags(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    config = str(folder / "config.yaml")
    resume = ["--resume", "--output_dir", str(folder)]
    assert with_saved_settings(resume) == resume  # nothing saved there
    Path(config).touch()
    assert with_saved_settings(resume) == ["--config", config, *resume]
    for flags in (
        ["--resume=True", f"--output-dir={folder}"],
        ["--resume_from_checkpoint", "--output_dir", str(folder)],
    ):
        assert with_saved_settings(flags) == ["--config", config, *flags]
    for flags in (resume[1:], [*resume[1:], "--resume", "False"], [*resume[1:], "--run_name", "resume"]):
        assert with_saved_settings(flags) == flags
    # The saved max_steps would win over the epochs that are now asked for.
    more = [*resume, "--num_train_epochs", "9"]
    assert with_saved_settings(more) == ["--config", config, "--max_steps=-1", *more]


def test_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "/data/[bold]me[/bold] :smile: 我/recording [1].wav"
    plain_console().print(name, soft_wrap=True)
    assert capsys.readouterr().out == f"{name}\n"


def test_suggested_commands_can_be_pasted(
    tmp_path: Path, recordings, train, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "it's my run"
    assert train(recordings(), out, "--max_steps=1", "--eval_steps=1") == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if line.startswith("  resonance")]
    assert [command[1] for command in commands] == ["evaluate", "transcribe"]
    assert all(command[command.index("--model_path") + 1] == str(out) for command in commands)


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and signals of POSIX")
def test_a_closed_pipe_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "resonance", "train", "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=60
    )
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == b""
