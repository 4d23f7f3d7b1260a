"""Ctrl-C and SIGTERM: what can be saved is saved, the exit code says which it was, and nobody sees a traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from forked import Forked
from resonance import cli
from resonance.cli import run
from resonance.data.audio import iter_blocks
from resonance.model.adapters import read_info
from resonance.model.runs import RunFolder, read_events

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])


def send_at_call(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, number: int) -> None:
    """Send this process a signal when `owner.name` is called for the given time, and let the call go on."""
    original = getattr(owner, name)
    calls = 0

    def signalling(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, signalling)


def steps(folder: Path, key: str) -> list[int]:
    return [row["step"] for row in read_events(folder / "events.jsonl") if key in row]


@BOTH
def test_a_signal_in_the_middle_of_training_saves_the_step_under_way(
    number: int,
    code: int,
    tmp_path: Path,
    recordings: Callable[..., Path],
    train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from resonance.train.trainer import WhisperTrainer

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_at_call(patch, WhisperTrainer, "training_step", 3, number)
        assert train(recordings(), folder) == code
    said = capsys.readouterr().err
    assert said.startswith("Stopped at step 3.") and "--resume" in said and "Error" not in said
    latest = RunFolder(folder).latest_checkpoint()
    assert latest and latest.name == "checkpoint-3" and str(latest) in said
    assert not (folder / "adapter").exists()
    assert run(["train", "--resume", "--output_dir", str(folder)]) == 0
    assert steps(folder, "loss") == [1, 2, 3, 4]


@BOTH
def test_a_signal_while_measuring_saves_the_step_before_and_resuming_measures_the_last_one(
    number: int,
    code: int,
    tmp_path: Path,
    recordings: Callable[..., Path],
    train: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from resonance.train import trainer

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_at_call(patch, trainer, "decode", 2, number)
        # One clip at a time: the second of three is under way when the signal comes.
        assert train(recordings(), folder, "--eval_steps=4", "--per_device_eval_batch_size=1") == code
    assert capsys.readouterr().err.startswith("Stopped at step 4.")
    assert steps(folder, "eval_wer") == []
    assert run(["train", "--resume", "--output_dir", str(folder)]) == 0
    assert steps(folder, "loss") == [1, 2, 3, 4]
    assert steps(folder, "eval_wer") == [4]


def test_a_step_whose_measuring_was_stopped_is_measured_on_resuming_and_can_be_the_best(
    tmp_path: Path, recordings: Callable[..., Path], train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resonance.train import trainer

    labels, folder, undisturbed = recordings(), tmp_path / "run", tmp_path / "undisturbed"
    # From the second measurement on it gets worse, so that the best step is the one whose measuring is stopped.
    flags = ("--eval_steps=2", "--max_steps=6", "--learning_rate=0.3", "--per_device_eval_batch_size=1")
    assert train(labels, undisturbed, *flags) == 0
    with monkeypatch.context() as patch:
        send_at_call(patch, trainer, "decode", 2, signal.SIGTERM)
        assert train(labels, folder, *flags) == 143
    assert steps(folder, "eval_wer") == []
    assert run(["train", "--resume", "--output_dir", str(folder)]) == 0
    assert steps(folder, "eval_wer") == steps(undisturbed, "eval_wer") == [2, 4, 6]
    found, expected = (read_info(place / "adapter").scores for place in (folder, undisturbed))
    assert expected["step"] == 2
    assert found == pytest.approx(expected)


def wait_for(condition: Callable[[], object], process: Forked, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def long_training(model: Path, labels: Path, folder: Path, workers: int) -> list[str]:
    flags = "--max_steps=100000 --eval_strategy=no --validation_split=0 --logging_steps=1 --save_steps=100000 --warmup_steps=0"
    command = ["train", "--model_name_or_path", str(model), "--train_file", str(labels), "--output_dir", str(folder)]
    return [*command, *flags.split(), f"--dataloader_num_workers={workers}"]


def test_ctrl_c_in_a_terminal_reaches_the_loader_s_processes_too_and_none_complains(
    tmp_path: Path, recordings: Callable[..., Path], tiny_model: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log.txt"
    command = ["-m", "resonance", *long_training(tiny_model, recordings(count=40), folder, workers=2)]
    process = Forked(command, out=log, new_session=True)  # a process group of its own, as a terminal gives it
    try:
        wait_for(lambda: (folder / "events.jsonl").exists() and len(steps(folder, "loss")) > 3, process, log)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
        process.wait()
    said = log.read_text()
    assert "Traceback" not in said and "Exception" not in said and "Warning" not in said, said
    latest = RunFolder(folder).latest_checkpoint()
    assert latest and f"Stopped at step {latest.name.removeprefix('checkpoint-')}." in said
    assert run(["train", "--resume", "--output_dir", str(folder), f"--max_steps={steps(folder, 'loss')[-1] + 1}"]) == 0


def test_a_second_signal_ends_at_once(
    tmp_path: Path,
    recordings: Callable[..., Path],
    tiny_model: Path,
) -> None:
    """The second one arrives while the step under way never ends."""
    script = (
        "import sys, time\n"
        "from resonance.cli import run\n"
        "from resonance.train.trainer import WhisperTrainer\n"
        "def stuck(*args, **kwargs):\n"
        "    print('stuck', flush=True)\n"
        "    while True: time.sleep(0.05)\n"
        "WhisperTrainer.training_step = stuck\n"
        "run(sys.argv[1:])\n"
    )
    command = long_training(tiny_model, recordings(), tmp_path / "run", workers=0)
    log = tmp_path / "log.txt"
    process = Forked(["-c", script, *command], out=log)
    try:
        wait_for(lambda: log.exists() and "stuck" in log.read_text(), process, log)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None  # waits for the step
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


def test_sigterm_while_transcribing_leaves_nothing_half_written(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from resonance.transcribe.torch_engine import TorchRecognizer

    send_at_call(monkeypatch, TorchRecognizer, "transcribe", 2, signal.SIGTERM)
    out = tmp_path / "out" / "texts.json"
    audio = finished_run.parent / "recordings" / "audio"
    command = ["transcribe", "--model_path", str(finished_run), "--audio_path", str(audio), "--batch_size", "2"]
    assert run([*command, "--output_file", str(out)]) == 143
    assert capsys.readouterr().err == "Stopped.\n"
    kept = {".texts.json.settings.json", "texts.json.part.jsonl"}  # what a later run goes on with
    assert {path.name for path in out.parent.iterdir()} <= kept
    monkeypatch.undo()
    assert run([*command, "--output_file", str(out)]) == 0
    assert {path.name for path in out.parent.iterdir()} == {".texts.json.settings.json", "texts.json"}


@BOTH
def test_a_signal_while_converting_leaves_whole_files_and_the_next_run_does_the_rest(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from resonance.data import convert

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(3):
        soundfile.write(source / f"{i}.flac", np.full(48_000 * 20, 0.1), 48_000)

    def interrupted(path: Path) -> Iterator[np.ndarray]:
        for block in iter_blocks(path):
            yield block
            if path.stem == "1":
                os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "iter_blocks", interrupted)
        assert run(["data", "convert", str(source), str(target), "--workers", "1"]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert [(path.name, soundfile.info(path).frames) for path in target.iterdir()] == [("0.wav", 16_000 * 20)]
    assert run(["data", "convert", str(source), str(target), "--workers", "1"]) == 0
    assert sorted(path.name for path in target.iterdir()) == ["0.wav", "1.wav", "2.wav"]


@BOTH
def test_a_signal_while_a_library_is_being_imported_ends_the_command_without_a_traceback(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Attribute:
        def __set_name__(self, owner: type, name: str) -> None:
            os.kill(os.getpid(), number)

    def importing(argv: list[str]) -> int:
        type("OfALibrary", (), {"attribute": Attribute()})
        return 0

    monkeypatch.setitem(cli.COMMANDS, "train", importing)
    assert run(["train"]) == code
    assert capsys.readouterr().err == "Stopped.\n"
