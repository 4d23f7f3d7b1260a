"""Memory that runs out in the middle of a training: smaller settings, the same samples, nothing lost."""

from __future__ import annotations

import contextlib
import json
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from resonance.config import TrainConfig
from resonance.errors import OutOfMemoryError
from resonance.finetune import finetune
from resonance.model.rungs import Rung, below
from resonance.model.runs import read_events
from resonance.train import alignment, build
from resonance.train.trainer import WhisperTrainer

SETTINGS: dict[str, Any] = {
    "language": "en",
    "max_steps": 4,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "warmup_steps": 1,
    "learning_rate": 0.01,
    "validation_split": 0.0,
    "lora_dropout": 0.0,
    "lora_r": 4,
    "optim": "sgd",
    "dataloader_num_workers": 0,
    "context_alignment_steps": 0,
    "extra": {"use_cpu": True},
}


class Memory:
    """A device that holds `limit` bytes for backward: what autograd keeps beyond them is out of memory."""

    def __init__(self, limit: float = float("inf")) -> None:
        self.limit = limit
        self.kept = self.most = 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept += tensor.untyped_storage().nbytes()
        self.most = max(self.most, self.kept)
        if self.kept > self.limit:
            raise torch.OutOfMemoryError(f"simulated: {self.kept} of {self.limit} bytes")
        return tensor

    @contextlib.contextmanager
    def installed(self, method: str = "training_step") -> Iterator[None]:
        real = getattr(WhisperTrainer, method)

        def step(trainer: WhisperTrainer, *given: Any, **named: Any) -> Any:
            self.kept = 0  # backward has freed what forward kept
            with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
                return real(trainer, *given, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(WhisperTrainer, method, step)
            yield


@pytest.fixture
def run(uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that trains into a folder of this name and returns it."""
    labels = uneven_labels(20)

    def train(name: str, console: Console | None = None, **changes: Any) -> Path:
        given = {"train_file": labels, "model_name_or_path": str(tiny_model), "output_dir": tmp_path / name}
        config = TrainConfig.model_validate(given | SETTINGS | changes)
        finetune(config, console or Console(quiet=True))
        return tmp_path / name

    return train


def losses(out: Path) -> dict[int, float]:
    rows = [row for row in read_events(out / "events.jsonl") if "loss" in row]
    assert len(rows) == len({row["step"] for row in rows})  # no step twice
    return {row["step"]: row["loss"] for row in rows}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def full_events(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_events(out / "events.jsonl") if "out_of_memory" in row]


@pytest.fixture
def whole(run: Callable[..., Path]) -> tuple[Path, int]:
    """A training with all the memory it wants, and how much it kept at most."""
    memory = Memory()
    with memory.installed():
        return run("whole"), memory.most


@pytest.mark.parametrize(("share", "batches"), [(0.6, [4]), (0.3, [4, 2])])
def test_smaller_batches_train_the_same_weights_when_memory_runs_out(
    run: Callable[..., Path],
    whole: tuple[Path, int],
    share: float,
    batches: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    unbroken, most = whole
    with Memory(share * most).installed():
        small = run("small", Console(width=300))
    assert [row["per_device_train_batch_size"] for row in full_events(small)] == batches
    assert losses(small) == pytest.approx(losses(unbroken), abs=2e-4)
    for name, weight in weights(unbroken).items():
        torch.testing.assert_close(weights(small)[name], weight, atol=1e-5, rtol=1e-4)
    shown = capsys.readouterr().out
    assert shown.count("Out of memory at step") == len(batches)
    assert f"begin with them next time: --per_device_train_batch_size {batches[-1]}" in shown
    made = json.loads((small / "adapter" / "resonance.json").read_text(encoding="utf-8"))["settings"]
    assert made["per_device_train_batch_size"] == batches[-1]
    assert made["per_device_train_batch_size"] * made["gradient_accumulation_steps"] == 8


def test_a_step_that_ran_out_is_begun_again_with_the_same_random_numbers(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full only once, in the middle of step 3, after its dropout was drawn: what follows is the undisturbed run."""
    dropout = {"lora_dropout": 0.3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    unbroken = run("unbroken", **dropout)
    real, calls = WhisperTrainer.training_step, []

    def once(trainer: WhisperTrainer, *given: Any, **named: Any) -> Any:
        calls.append(trainer.state.global_step)
        loss = real(trainer, *given, **named)
        if len(calls) == 2 * 8 + 3:
            raise torch.OutOfMemoryError("simulated")
        return loss

    monkeypatch.setattr(WhisperTrainer, "training_step", once)
    broken = run("broken", **dropout)
    assert full_events(broken) == [{"step": 2, "out_of_memory": "training", "gradient_checkpointing": True}]
    assert calls.count(2) == 3 + 4  # of the four recordings that are left for it
    assert losses(broken) == pytest.approx(losses(unbroken), abs=1e-6)
    for name, weight in weights(unbroken).items():
        torch.testing.assert_close(weights(broken)[name], weight, atol=1e-6, rtol=1e-5)


def test_nothing_of_the_attempt_that_failed_is_held_while_the_next_one_trains(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    alive: list[list[bool]] = []
    real_build, real_step = build.choose_weights, WhisperTrainer.training_step

    def choose(*given: Any) -> Any:
        alive.append([model() is not None for model in models])
        model = real_build(*given)
        models.append(weakref.ref(model))
        return model

    def large_is_too_much(trainer: WhisperTrainer, model: Any, inputs: Any, *given: Any) -> Any:
        loss = real_step(trainer, model, inputs, *given)
        if len(inputs["labels"]) > 2:
            raise torch.OutOfMemoryError("simulated")
        return loss

    monkeypatch.setattr(build, "choose_weights", choose)
    monkeypatch.setattr(WhisperTrainer, "training_step", large_is_too_much)
    run("released")
    assert alive == [[], [False], [False, False]]


def test_an_evaluation_that_runs_out_is_repeated_in_smaller_batches_and_not_skipped(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"validation_split": 0.4, "eval_steps": 2, "per_device_eval_batch_size": 8}
    unbroken = run("unbroken", **measured)
    real = WhisperTrainer.prediction_step

    def small_only(trainer: WhisperTrainer, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        if len(inputs["labels"]) > 4:
            raise torch.OutOfMemoryError("simulated")
        return real(trainer, model, inputs, *given, **named)

    monkeypatch.setattr(WhisperTrainer, "prediction_step", small_only)
    broken = run("broken", **measured)
    assert [row["per_device_eval_batch_size"] for row in full_events(broken)] == [4]
    scores = [
        {row["step"]: row["eval_cer"] for row in read_events(out / "events.jsonl") if "eval_cer" in row}
        for out in (unbroken, broken)
    ]
    assert sorted(scores[1]) == [2, 4] and scores[0] == pytest.approx(scores[1])
    for name, weight in weights(unbroken).items():
        torch.testing.assert_close(weights(broken)[name], weight, atol=1e-6, rtol=1e-5)


def test_fitting_the_audio_context_comes_down_too_and_teaches_the_same(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = alignment._differences

    def trained(name: str, memory: Memory) -> Path:
        def differences(*given: Any) -> Iterator[torch.Tensor]:
            parts = real(*given)
            while True:
                memory.kept = 0  # backward has freed what the part before kept
                with torch.autograd.graph.saved_tensors_hooks(memory.pack, lambda tensor: tensor):
                    part = next(parts, None)
                if part is None:
                    return
                yield part

        monkeypatch.setattr(alignment, "_differences", differences)
        return run(name, context_alignment_steps=3)

    whole = Memory()
    unbroken = trained("whole", whole)
    assert whole.most > 0
    broken = trained("small", Memory(0.6 * whole.most))
    assert [(row["step"], row["per_device_train_batch_size"]) for row in full_events(broken)] == [(0, 4)]
    for name, weight in weights(unbroken).items():
        torch.testing.assert_close(weights(broken)[name], weight, atol=1e-5, rtol=1e-4)


def test_weights_that_find_no_room_end_with_what_to_do(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    def load(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(build, "load_base", load)
    with pytest.raises(OutOfMemoryError, match=rf"weights of {re.escape(str(tiny_model))}.*nvidia-smi.*--use_4bit"):
        run("nothing")


def test_the_last_rung_ends_with_what_was_tried_and_what_would_fit(run: Callable[..., Path], tmp_path: Path) -> None:
    with Memory(1000).installed(), pytest.raises(OutOfMemoryError) as caught:
        run("nothing")
    said = str(caught.value)
    assert "Tried: 8 x 1" in said and "1 x 8" in said and "gradient_checkpointing" in said
    assert "--resume" in said


def test_an_error_that_is_not_about_memory_is_not_taken_for_one(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(WhisperTrainer, "training_step", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run("broken")


def test_rungs_keep_the_effective_batch_and_end_with_shorter_audio() -> None:
    start = Rung("none", 8, 1, False, 30.0)
    rungs = list(below(start, may_quantize=True))
    assert rungs[0] == Rung("8bit", 8, 1, False, 30.0)
    assert [(r.per_device_train_batch_size, r.gradient_accumulation_steps) for r in rungs[1:4]] == [
        (4, 2),
        (2, 4),
        (1, 8),
    ]
    assert all(r.effective_batch == 8 for r in rungs)
    assert rungs[4].gradient_checkpointing and rungs[4].max_audio_len == 30.0
    assert [r.max_audio_len for r in rungs[5:]] == sorted((r.max_audio_len for r in rungs[5:]), reverse=True)
    assert list(below(rungs[-1], may_quantize=False)) == []


def test_eight_bits_are_left_out_of_every_rung_where_they_take_more() -> None:
    def takes(rung: Rung) -> int:
        return 100 * rung.per_device_train_batch_size * (2 if rung.quantization == "8bit" else 1)

    rungs = list(below(Rung("none", 8, 1, False, 30.0), may_quantize=True, takes=takes))
    assert rungs and all(rung.quantization == "none" for rung in rungs)


def test_audio_is_not_shortened_where_few_recordings_would_be_left(run: Callable[..., Path], tmp_path: Path) -> None:
    """All recordings are about as long: a shorter limit would leave none."""
    with Memory(1000).installed(), pytest.raises(OutOfMemoryError):
        run("nothing", per_device_train_batch_size=1, gradient_checkpointing=True)
    assert not (tmp_path / "nothing" / "events.jsonl").exists()  # no rung was taken


def test_a_run_that_came_down_goes_on_there_also_when_the_first_command_is_repeated(
    run: Callable[..., Path], whole: tuple[Path, int]
) -> None:
    _unbroken, most = whole
    with Memory(0.6 * most).installed():
        small = run("small", max_steps=2)
        run("small", max_steps=4, resume=True)  # with per_device_train_batch_size 8, as at first
    assert len(full_events(small)) == 1
    assert sorted(losses(small)) == [1, 2, 3, 4]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6, 7, 12, 100])
def test_any_batch_can_be_divided(batch: int) -> None:
    rungs = list(below(Rung("none", batch, 3, True, 5.0), may_quantize=False))
    assert all(r.effective_batch == 3 * batch for r in rungs)
    assert batch == 1 or rungs[-1].per_device_train_batch_size == 1
