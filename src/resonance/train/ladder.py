"""When memory runs out: save where the run is, take smaller settings, go on with the same recordings.

The order is that of `model.rungs`; a rung that the byte model says would not help is left out. A step that ran out of memory
has changed nothing: it is begun again from its random state, so nothing is skipped and nothing is trained twice. The effective
batch stays, so what is learnt stays too; only shorter audio, the last rung, leaves recordings out.
"""

from __future__ import annotations

import contextlib
import gc
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback

from resonance.config import TrainConfig
from resonance.errors import OutOfMemoryError
from resonance.messages import _
from resonance.model.memory import predict
from resonance.model.precision import training_precision
from resonance.model.rungs import Rung, below, job_for
from resonance.model.runs import RunFolder
from resonance.model.sizes import PUBLISHED, WhisperShape
from resonance.train import progress, resume
from resonance.train.rows import Rows
from resonance.train.trainer import WhisperTrainer
from resonance.units import GIBIBYTE

Phase = Literal["training", "evaluation"]
CPU_ALLOCATOR, APPLE = "DefaultCPUAllocator: can't allocate memory", "MPS backend out of memory"


class MemoryFull(Exception):  # noqa: N818 - control flow: it is answered by the next rung
    """Memory ran out in `phase` at `step`; the run has been saved as it was before."""

    def __init__(self, phase: Phase, step: int, shape: WhisperShape) -> None:
        self.phase: Phase = phase
        self.step = step
        self.shape = shape


def is_memory_full(error: BaseException) -> bool:
    """Whether `error` says that the device has no memory left. On a processor and on Apple's GPUs torch has no type for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in (CPU_ALLOCATOR, APPLE))


def release() -> None:
    """Give back what the failed attempt held. To be called when nothing refers to its trainer any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class RandomState:
    """All generators that a step draws from."""

    python: Any
    numpy: Any
    processor: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.processor)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


class StepStart(TrainerCallback):  # type: ignore[misc]
    """Remembers the random state in which the step under way began."""

    def __init__(self) -> None:
        self.state: RandomState | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = RandomState.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = None


@contextlib.contextmanager
def watching(
    shape: WhisperShape, trainer: WhisperTrainer | None = None, start: StepStart | None = None
) -> Iterator[None]:
    """Turn a full memory inside the block into MemoryFull, once the state before it is saved.

    Without a trainer nothing has been trained yet and nothing is to be saved.
    """
    try:
        yield
    except Exception as error:
        if not is_memory_full(error):
            raise
        if trainer is None:
            raise MemoryFull("training", 0, shape) from None
        if trainer.args.world_size > 1:  # the other ranks wait inside this step
            raise OutOfMemoryError(
                _(
                    "The GPU has too little memory for these settings. Continue with --resume and half of "
                    "--per_device_train_batch_size with twice the --gradient_accumulation_steps, which trains the same, or "
                    "with --gradient_checkpointing."
                )
            ) from error
        phase: Phase = "evaluation" if trainer.evaluating else "training"
        full = MemoryFull(phase, trainer.state.global_step, shape)
        traceback.clear_frames(error.__traceback__)  # they hold the failed step's tensors, and saving needs room
    else:
        return
    trainer.model.zero_grad(set_to_none=True)
    release()
    if start and start.state:
        start.state.restore()
    saved = trainer.save_now()
    if full.phase == "evaluation":
        (saved / resume.UNMEASURED_FILE).touch()
    raise full


class Ladder:
    """The way down, and what was tried on it."""

    def __init__(self, run: RunFolder, console: Console) -> None:
        self.run = run
        self.console = console
        self.tried: list[str] = []

    def down(self, config: TrainConfig, rows: Rows, full: MemoryFull) -> TrainConfig:
        """The settings to go on with. Raises OutOfMemoryError where there are none left, with what was tried."""
        changes = next(self._changes(config, rows, full), None)
        self.tried.append(shown(config, full.phase))
        if changes is None:
            raise OutOfMemoryError(self._nothing_left(config, rows, full))
        self.console.print(
            _("Out of memory at step {step}. Going on with {changes}: the same recordings, nothing lost.").format(
                step=full.step, changes=", ".join(f"{name} {value}" for name, value in changes.items())
            ),
            style="yellow",
            soft_wrap=True,
        )
        progress.append_event(self.run.events, {"step": full.step, "out_of_memory": full.phase, **changes})
        # Validated as a whole: the rest of the settings has been already.
        return config.model_copy(update={**changes, "resume": True})

    def report(self, config: TrainConfig) -> None:
        """Which settings fitted, so that the next training begins with them."""
        if self.tried:
            self.console.print(
                _("These settings fitted, begin with them next time: {settings}").format(settings=flags(config)),
                soft_wrap=True,
            )

    def _changes(self, config: TrainConfig, rows: Rows, full: MemoryFull) -> Iterator[dict[str, Any]]:
        if full.phase == "evaluation":
            if config.per_device_eval_batch_size > 1:
                yield {"per_device_eval_batch_size": config.per_device_eval_batch_size // 2}
            return
        now = rung_of(config, rows)
        before = training_bytes(config, rows, full.shape, now)
        for rung in below(now, may_quantize=config.finetuning == "lora" and can_quantize()):
            if training_bytes(config, rows, full.shape, rung) < before:
                yield differences(now, rung)

    def _nothing_left(self, config: TrainConfig, rows: Rows, full: MemoryFull) -> str:
        text = _("Memory ran out at step {step}, also with the smallest settings. Tried: {tried}.").format(
            step=full.step, tried="; ".join(self.tried)
        )
        least = training_bytes(config, rows, full.shape, rung_of(config, rows))
        smaller = [name for name, shape in PUBLISHED.items() if shape.parameters < full.shape.parameters]
        lines = [text]
        if smaller:
            best = max(smaller, key=lambda name: PUBLISHED[name].parameters)
            needed = training_bytes(config, rows, PUBLISHED[best], rung_of(config, rows))
            lines.append(
                _(
                    "A smaller model needs less: openai/whisper-{size} about {needed:.1f} GiB in place of {least:.1f}."
                ).format(size=best, needed=needed / GIBIBYTE, least=least / GIBIBYTE)
            )
        lines.append(_("The checkpoints are kept: --resume goes on where memory is larger."))
        return " ".join(lines)


def rung_of(config: TrainConfig, rows: Rows) -> Rung:
    longest = max((row.duration or 0.0 for row in rows.train), default=config.max_audio_len)
    return Rung(
        config.quantization,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.gradient_checkpointing,
        min(config.max_audio_len, longest),
    )


def differences(before: Rung, after: Rung) -> dict[str, Any]:
    return {
        name: getattr(after, name)
        for name in Rung.__dataclass_fields__
        if getattr(after, name) != getattr(before, name)
    }


def training_bytes(config: TrainConfig, rows: Rows, shape: WhisperShape, rung: Rung) -> int:
    """Predicted bytes of a training step at its fullest."""
    labels = max((len(row.text.encode()) for row in rows.train), default=1)  # a token is at least a byte
    precision = training_precision(config.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return predict(job_for(config, shape, rung, precision, labels)).peak


def can_quantize() -> bool:
    """bitsandbytes is there, and a GPU that it is fast on."""
    import importlib.util

    return torch.cuda.is_available() and importlib.util.find_spec("bitsandbytes") is not None


def shown(config: TrainConfig, phase: Phase) -> str:
    if phase == "evaluation":
        return f"per_device_eval_batch_size {config.per_device_eval_batch_size}"
    parts = [f"{config.per_device_train_batch_size} x {config.gradient_accumulation_steps}"]
    if config.quantization != "none":
        parts.append(config.quantization)
    if config.gradient_checkpointing:
        parts.append("gradient_checkpointing")
    return " ".join([*parts, f"{config.max_audio_len:g} s"])


def flags(config: TrainConfig) -> str:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "quantization")
    values = {name: getattr(config, name) for name in (*names, "max_audio_len", "per_device_eval_batch_size")}
    return " ".join(
        f"--{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()
    )
