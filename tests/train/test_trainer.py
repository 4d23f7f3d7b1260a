"""What the trainer does besides the loss: evaluation by real text, the log, the meter, errors out of workers."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from resonance.config import TrainConfig
from resonance.data.audio import read_audio
from resonance.data.audio_context import AudioContext
from resonance.errors import AudioError, Interrupted
from resonance.evaluate.metrics import score
from resonance.finetune import finetune
from resonance.model.checkpoints import is_complete
from resonance.model.load import load_whisper
from resonance.model.runs import RunFolder, read_events
from resonance.train.progress import EventLog
from resonance.train.trainer import Meter, clean_worker_errors
from resonance.transcribe.recognizer import DecodeSettings
from resonance.transcribe.torch_engine import TorchRecognizer


@pytest.fixture
def evaluating(
    training: Any, uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path
) -> Callable[..., Any]:
    """A function that builds a trainer with 3 of 12 rows held out."""

    def build(**changes: Any) -> Any:
        settings = {"validation_split": 0.25, "audio_context": "auto", "eval_steps": 1}
        return training.trainer_for(
            training.settings(
                uneven_labels(12), tiny_model, tmp_path / "run", **({"max_steps": 1} | settings | changes)
            )
        )

    return build


def test_error_rates_are_those_of_the_text_that_the_recogniser_writes(
    evaluating: Callable[..., Any], tiny_model: Path
) -> None:
    trainer = evaluating()
    metrics = trainer.evaluate()

    rows = trainer.eval_dataset.rows
    whisper = load_whisper(str(tiny_model), device=torch.device("cpu"))
    object.__setattr__(whisper, "model", trainer.model)
    recognizer = TorchRecognizer(whisper, AudioContext("auto", 0.6))
    heard = recognizer.transcribe([read_audio(row.audio) for row in rows], DecodeSettings(language="en"))
    expected = score([(row.text, transcript.text) for row, transcript in zip(rows, heard, strict=True)], "en")
    assert len(rows) == metrics["eval_utterances"] >= 3
    assert any(transcript.text for transcript in heard)
    assert metrics["eval_cer"] == pytest.approx(expected.cer.value)
    assert metrics["eval_wer"] == pytest.approx(expected.wer.value)


def test_evaluation_changes_neither_the_clips_nor_the_weights_and_keeps_no_logits(
    evaluating: Callable[..., Any],
) -> None:
    trainer = evaluating(speed_perturbation=0.1, gain_db=6.0, apply_spec_augment=True)
    assert trainer.train_dataset.augmentation.speed == 0.1
    assert trainer.eval_dataset.augmentation is None and trainer.eval_dataset.timestamp_fraction == 0.0
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] and first["eval_cer"] == second["eval_cer"]
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())

    batch = next(iter(trainer.get_eval_dataloader()))
    loss, ids, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert loss.ndim == 0 and ids.ndim == labels.ndim == 2 and not ids.is_floating_point()


def test_the_result_is_the_best_step_and_says_so(evaluating: Callable[..., Any], tmp_path: Path) -> None:
    trainer = evaluating(max_steps=4, learning_rate=1.0)
    trainer.train()
    rates = {row["step"]: row["eval_wer"] for row in trainer.state.log_history if "eval_wer" in row}
    best = min(rates, key=lambda step: (rates[step], step))
    scores = trainer.kept_scores()
    assert sorted(rates) == [1, 2, 3, 4]
    assert (scores["step"], scores["wer"]) == (best, rates[best])
    kept = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    weights = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters()}
    for name, weight in kept.items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize(("done", "epoch"), [(0.0, 0), (1.67, 1), (1.9999999, 2), (3.0, 3)])
def test_the_order_of_clips_follows_the_epoch_that_a_run_is_in(
    evaluating: Callable[..., Any], done: float, epoch: int
) -> None:
    # accelerate tells samplers too, but not through both its wrappers: several processes, resumed within an epoch.
    trainer = evaluating()
    trainer.state.epoch = done
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.sampler.epoch == epoch


def test_gradient_checkpointing_trains_the_same(
    training: Any, uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path
) -> None:
    labels = uneven_labels(8)
    plain, checkpointed = (
        training.train(training.settings(labels, tiny_model, tmp_path / str(c), max_steps=2, gradient_checkpointing=c))
        for c in (False, True)
    )
    assert checkpointed.losses == pytest.approx(plain.losses, abs=1e-5)
    assert checkpointed.gradient_norms == pytest.approx(plain.gradient_norms, abs=1e-5)


def test_a_signal_writes_a_checkpoint_and_the_run_goes_on_from_it(
    training: Any,
    uneven_labels: Callable[[int], Path],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = training.settings(uneven_labels(11), tiny_model, tmp_path / "whole", max_steps=4)

    def run(name: str, **changes: Any) -> Path:
        config = given | {"output_dir": str(tmp_path / name), **changes}
        return finetune(TrainConfig.model_validate(config), Console(quiet=True))

    whole = run("whole")
    log = EventLog.on_log

    def signalled(self: EventLog, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        log(self, args, state, *rest, **kwargs)
        if state.global_step == 1:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "on_log", signalled)
        with pytest.raises(Interrupted, match="--resume") as stopped:
            run("stopped")
    assert stopped.value.exit_code == 143
    latest = RunFolder(tmp_path / "stopped").latest_checkpoint()
    assert latest is not None and latest.name == "checkpoint-2" and is_complete(latest)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    resumed = load_file(run("stopped", resume=True) / "adapter_model.safetensors")
    for name, weight in load_file(whole / "adapter_model.safetensors").items():
        torch.testing.assert_close(resumed[name], weight, rtol=0, atol=1e-6, msg=name)


def state(step: int, *, first_process: bool = True) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, is_world_process_zero=first_process)


def test_rows_behind_the_resumed_step_and_a_torn_line_make_way_for_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(
        '{"step": 4, "loss": 2.0}\n{"step": 4, "eval_loss": 2.5}\n{"step": 5, "loss": 1.9}\n{"step": 6, "lo'
    )
    log = EventLog(path)
    log.on_train_begin(None, state(4), None)
    log.on_log(None, state(5), None, {"loss": 1.8})
    assert read_events(path) == [{"step": 4, "loss": 2.0}, {"step": 4, "eval_loss": 2.5}, {"step": 5, "loss": 1.8}]


@pytest.mark.parametrize("torn", ['{"step": 5, "lo', '{"step": 4, "loss": 2.0}', "\n"])
def test_the_row_after_a_kill_starts_a_line_of_its_own(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 4, "loss": 2.0}\n' + torn)
    log = EventLog(path)
    log.on_train_begin(None, state(4), None)
    log.on_log(None, state(5), None, {"loss": 1.8})
    assert json.loads(path.read_text().splitlines()[-1]) == {"step": 5, "loss": 1.8}
    assert read_events(path)[-1]["step"] == 5


def test_only_the_first_process_writes_the_log(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.on_log(None, state(1, first_process=False), None, {"loss": 1.0})
    assert not (tmp_path / "events.jsonl").exists()


def test_speed_leaves_out_pauses_and_counts_waiting() -> None:
    now = 0.0
    meter = Meter(samples_per_step=8, clock=lambda: now)

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    with meter.pausing():
        passes(50.0)  # a resumed run measured a step before it trains
    with meter.waiting():
        passes(5.0)  # workers start: not counted
    passes(3.0)
    with meter.waiting():
        passes(1.0)
    with meter.pausing():
        passes(100.0)  # evaluation
    assert meter.read(step=2) == {"samples_per_second": 4.0, "data_wait": 0.25}
    passes(2.0)
    assert meter.read(step=3) == {"samples_per_second": 4.0, "data_wait": 0.0}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_vanishes_while_training_is_named_without_a_traceback(
    training: Any, uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path, workers: int
) -> None:
    labels = uneven_labels(8)
    trainer = training.trainer_for(
        training.settings(labels, tiny_model, tmp_path / "run", dataloader_num_workers=workers)
    )
    gone = sorted((labels.parent / "audio").iterdir())[3]
    gone.unlink()
    with pytest.raises(AudioError) as error:
        trainer.train()
    assert str(error.value).startswith(str(gone)) and "Traceback" not in str(error.value)


def test_errors_that_are_not_about_data_pass_unchanged() -> None:
    with pytest.raises(KeyError, match="x"), clean_worker_errors():
        raise KeyError("x")
