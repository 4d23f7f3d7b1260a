"""`resonance train --streaming`: the same weights after a stop, nothing held out is trained on, and clear refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from resonance.cli import run as command
from resonance.config import TrainConfig
from resonance.data.clip_stream import ClipStream
from resonance.data.samples import Sample
from resonance.data.sources import open_source
from resonance.finetune import finetune
from resonance.model.checkpoints import COMPLETE_FILE
from resonance.model.runs import read_events
from resonance.train.rows import read_rows
from resonance.train.trainer import WhisperTrainer

STEPS = 8
SETTINGS: dict[str, Any] = {
    "streaming": True,
    "shuffle_buffer": 16,
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 recordings in tar files of four; two share a sentence with another."""
    conftest = _tests_conftest()
    folder = tmp_path_factory.mktemp("streamed")
    labels = conftest.write_recordings(folder / "recordings", 22, (0.4, 1.2))
    rows = json.loads(labels.read_text())
    rows[20]["text"], rows[21]["text"] = rows[3]["text"].upper(), rows[7]["text"] + "!"
    labels.write_text(json.dumps(rows))
    out = folder / "shards"
    given = ["data", "shard", "--train_file", str(labels), "--output_dir", str(out), "--clips_per_shard=4"]
    assert command(given) == 0
    return out


def _tests_conftest() -> Any:
    spec = importlib.util.spec_from_file_location("resonance_tests", Path(__file__).parents[1] / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(shards: Path, model: Path, out: Path, console: Console | None = None, **changes: Any) -> Path:
    given = {"train_file": shards, "model_name_or_path": str(model), "output_dir": out, **SETTINGS, **changes}
    return finetune(TrainConfig.model_validate(given), console or Console(quiet=True))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def losses(out: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_events(out / "events.jsonl") if "loss" in row]


@pytest.fixture(scope="module")
def unbroken(shards: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training of 8 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(shards, tiny_model, out)
    return out


@pytest.mark.parametrize("step", [2, 6])
def test_a_killed_run_goes_on_at_the_very_next_recording_and_ends_with_the_same_weights(
    unbroken: Path, shards: Path, tiny_model: Path, tmp_path: Path, step: int
) -> None:
    out = shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(out / "adapter")
    for folder in (out / "checkpoints").iterdir():
        saved = int(folder.name.split("-")[1])
        if saved == step + 2:
            (folder / COMPLETE_FILE).unlink()
        elif saved > step:
            shutil.rmtree(folder)
    torch.manual_seed(12345)  # whatever else this process has drawn

    run(shards, tiny_model, out, resume=True)
    for part in ("adapter", f"checkpoints/checkpoint-{STEPS}"):
        resumed, expected = weights(out / part), weights(unbroken / part)
        assert all(torch.equal(resumed[name], weight) for name, weight in expected.items())
    assert losses(out) == losses(unbroken)
    last = Path(f"checkpoints/checkpoint-{STEPS}/stream-0.json")
    assert (out / last).read_text() == (unbroken / last).read_text()


def test_the_next_step_of_a_resumed_run_depends_on_where_the_stream_stood(
    unbroken: Path, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # What the test above compares would be equal too if every step saw the same.
    out = shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(out / "adapter")
    for step in (6, 8):
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{step}")
    path = out / "checkpoints" / "checkpoint-4" / "stream-0.json"
    state = json.loads(path.read_text())
    size = path.stat().st_size
    state["standings"] = {reader: [[1, 0, 0], 0, 0] for reader in state["standings"]}
    path.write_text(json.dumps(state).ljust(size)[:])
    sizes = json.loads((path.parent / COMPLETE_FILE).read_text())
    (path.parent / COMPLETE_FILE).write_text(json.dumps(sizes | {path.name: path.stat().st_size}))
    run(shards, tiny_model, out, resume=True)
    assert losses(out)[:4] == losses(unbroken)[:4] and losses(out)[4:] != losses(unbroken)[4:]


def test_sentences_held_out_are_measured_on_and_never_trained_on(
    unbroken: Path, shards: Path, tiny_model: Path, tmp_path: Path
) -> None:
    held_out = json.loads((unbroken / "data" / "held_out.json").read_text())
    names = {row["text"].strip("!").lower() for row in held_out}
    assert 1 <= len(names) <= 9
    given = {"train_file": shards, "model_name_or_path": str(tiny_model), "output_dir": tmp_path / "x", **SETTINGS}
    config = TrainConfig.model_validate(given)
    rows = read_rows(config, Console(quiet=True), tmp_path / "clips")
    assert rows.stream is not None
    choice = rows.stream.choice
    every = [s for unit in range(6) for s in open_source(shards).read(unit, range(10))]
    kept = {s.utterance.text for s in every if choice(s)}
    assert kept == {s.utterance.text for s in every if s.utterance.text.strip("!").lower() not in names}
    assert {row.text for row in rows.train} == kept  # all of so little stands for all
    assert all((unbroken / "data" / row["audio"]).is_file() for row in held_out)
    assert command(["evaluate", "--model_path", str(unbroken), "--output_dir", str(tmp_path / "report")]) == 0


def test_few_are_measured_on_where_asked_and_other_sentences_are_not_lost(shards: Path, tmp_path: Path) -> None:
    given = {"train_file": shards, "output_dir": tmp_path, **SETTINGS, "validation_split": 0.5, "max_eval_samples": 2}
    rows = read_rows(TrainConfig.model_validate(given), Console(quiet=True), tmp_path / "clips")
    assert len(rows.held_out) == 2 and len({row.text for row in rows.train}) >= 18


def test_another_file_is_measured_on_where_given(shards: Path, tmp_path: Path) -> None:
    given = {"train_file": shards, "output_dir": tmp_path, **SETTINGS, "validation_file": shards / "clips-000001.tar"}
    rows = read_rows(TrainConfig.model_validate(given), Console(quiet=True), tmp_path / "clips")
    assert len(rows.held_out) == 4 and len(rows.train) == 22


def test_the_run_folder_says_what_was_streamed_and_other_data_is_refused(
    unbroken: Path, shards: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = json.loads((unbroken / "data" / "stream.json").read_text())
    assert stream["rows"] == 22 and stream["hours"] == pytest.approx(22 * 0.8 / 3600, rel=0.3)
    assert not (unbroken / "data" / "train.json").exists()
    made = json.loads((unbroken / "adapter" / "resonance.json").read_text())
    assert made["data"]["train_rows"] == 22 and made["data"]["fingerprint"] == stream["fingerprint"]

    out = shutil.copytree(unbroken, tmp_path / "run")
    before = (out / "config.yaml").read_bytes()
    resume = ["train", "--resume", "--output_dir", str(out), "--max_steps=10"]
    moved = shutil.copytree(shards, tmp_path / "moved")
    assert command([*resume, "--dataloader_num_workers=1"]) == 2
    assert "--dataloader_num_workers: 2 before, 1 now" in capsys.readouterr().err
    assert command([*resume, "--train_file", str(moved / "clips-000000.tar")]) == 1
    assert "was begun with other data" in capsys.readouterr().err
    assert (out / "config.yaml").read_bytes() == before
    assert command([*resume, "--train_file", str(moved)]) == 0  # the same data elsewhere
    assert [step for step, _loss in losses(out)] == list(range(1, 11))


def test_smaller_batches_after_memory_ran_out_train_the_same_recordings(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {"lora_dropout": 0.0, "apply_spec_augment": False, "optim": "sgd", "per_device_train_batch_size": 4}
    plain |= {"gradient_accumulation_steps": 1, "validation_split": 0.0, "max_steps": 5, "context_alignment_steps": 0}
    whole = run(shards, tiny_model, tmp_path / "whole", **plain)
    real = WhisperTrainer.training_step

    def full(trainer: WhisperTrainer, model: Any, inputs: dict[str, torch.Tensor], *given: Any, **named: Any) -> Any:
        if trainer.state.global_step >= 2 and len(inputs["labels"]) > 2:
            raise torch.OutOfMemoryError("simulated")
        return real(trainer, model, inputs, *given, **named)

    monkeypatch.setattr(WhisperTrainer, "training_step", full)
    small = run(shards, tiny_model, tmp_path / "small", **plain)
    assert "out_of_memory" in (tmp_path / "small" / "events.jsonl").read_text()
    assert [loss for _, loss in losses(tmp_path / "small")] == pytest.approx(
        [loss for _, loss in losses(tmp_path / "whole")], abs=1e-4
    )
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(small)[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_steps": None}, "streaming needs max_steps.*--max_steps 17: 3 passes through 22 recordings with 4"),
        ({"max_steps": None, "num_train_epochs": 3}, "streaming trains for max_steps updates"),
        ({"eval_strategy": "epoch"}, "Give eval_strategy steps"),
        ({"split_by": "within_sentence"}, "split_by within_sentence has to know"),
        ({"max_train_samples": 3}, "max_train_samples takes the first rows"),
        ({"streaming": False, "skip_broken": True}, "skip_broken is for streamed data"),
        ({"streaming": False, "train_file": "s3://bucket/x"}, "s3://bucket/x lies on another machine. Add --streaming"),
    ],
)
def test_settings_that_do_not_go_with_streaming_are_refused(
    shards: Path,
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: dict[str, Any],
    message: str,
) -> None:
    values = {
        "train_file": shards,
        "model_name_or_path": tiny_model,
        "output_dir": tmp_path / "run",
        **SETTINGS,
        **given,
    }
    values.pop("extra")
    flags = [f"--{name}={value}" for name, value in values.items() if value is not None]
    assert command(["train", *flags]) == 2
    import re

    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_shards_far_away_train_like_shards_here(unbroken: Path, shards: Path, tiny_model: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in shards.iterdir():
        memory.pipe(f"/voices/{path.name}", path.read_bytes())
    try:
        out = tmp_path / "run"
        run("memory://voices", tiny_model, out)  # type: ignore[arg-type]
        assert losses(out) == losses(unbroken)
        assert json.loads((out / "data" / "stream.json").read_text())["source"] == "memory://voices"
    finally:
        memory.rm("/voices", recursive=True)


def test_a_shard_that_breaks_while_training_is_named_in_one_line(
    shards: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(shards, tmp_path / "broken")
    for path in broken.glob("*.tar"):
        data = bytearray(path.read_bytes())
        for place in range(0, len(data), 512):  # every header but the first: sizes stay as the index says
            if place and data[place + 257 : place + 262] == b"ustar":
                data[place + 148 : place + 156] = b"0000000\0"
        path.write_bytes(data)
    given = {"train_file": broken, "model_name_or_path": tiny_model, "output_dir": tmp_path / "run", **SETTINGS}
    given |= {"validation_file": shards / "clips-000000.tar"}
    given.pop("extra")
    assert command(["train", *(f"--{name}={value}" for name, value in given.items())]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "Error" in line]
    assert ".tar: damaged or cut off at byte" in line and "--skip_broken" in line and "Traceback" not in line


def test_an_error_in_a_worker_says_where(
    shards: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resonance.errors import DataError

    def fail(self: ClipStream, sample: Sample) -> Any:
        raise DataError(f"{sample.utterance.audio}: no.")

    monkeypatch.setattr(ClipStream, "_audio", fail)
    with pytest.raises(DataError) as error:
        run(shards, tiny_model, tmp_path / "run")
    assert str(error.value).endswith(": no.") and "\n" not in str(error.value) and ".tar/" in str(error.value)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")
def test_two_ranks_read_their_own_shares_and_save_where_each_stands(
    recordings: Callable[..., Path], training: Any, tiny_model: Path, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("two_ranks", Path(__file__).with_name("test_two_ranks.py"))
    assert spec is not None and spec.loader is not None
    ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranks)
    given = training.settings(recordings(11), tiny_model, tmp_path / "ranks", max_steps=4, save_steps=2)
    given |= {"streaming": True, "per_device_train_batch_size": 2, "shuffle_buffer": 4}
    both = ranks.run_ranks(tmp_path, given)
    assert len(both["losses"]) == 4 and bool(torch.isfinite(both["losses"]).all())
    folder = tmp_path / "ranks" / "checkpoints" / "checkpoint-4"
    assert {"stream-0.json", "stream-1.json"} <= json.loads((folder / "complete.json").read_text()).keys()
    states = [json.loads((folder / f"stream-{rank}.json").read_text()) for rank in (0, 1)]
    assert [state["steps"] for state in states] == [4, 4]
    # 5 and 6 of 11 recordings: after 8 the first is in its second epoch, and so is the other.
    assert all(state["standings"]["0"][0][0] in (0, 1) for state in states)


def test_a_plan_streams_what_cannot_be_listed_and_trains_with_it(
    shards: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "plan.yaml"
    asked = ["plan", "--model_name_or_path", str(tiny_model), "--max_steps=2", "--eval_steps=2", "--json"]
    assert command([*asked, "--train_file", str(shards), "--write", str(written)]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["settings"]["streaming"] is True and plan["recordings"]["train"] >= 18
    assert command([*asked, "--train_file", str(shards.parent / "recordings")]) == 0
    assert "streaming" not in json.loads(capsys.readouterr().out)["settings"]
    train = ["train", "--config", str(written), "--output_dir", str(tmp_path / "run"), "--dataloader_num_workers=0"]
    assert command(train) == 0
    assert json.loads((tmp_path / "run" / "data" / "stream.json").read_text())["rows"] == 22
