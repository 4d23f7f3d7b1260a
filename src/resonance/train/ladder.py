"""When memory runs out: save where the run is, take smaller settings, go on with the same recordings.

The order is that of `model.rungs`; a rung that the byte model says would not help is left out. A step that ran out of memory
has changed nothing: it is begun again from its random state, so nothing is skipped and nothing is trained twice. The effective
batch stays, so what is learnt stays too; only shorter audio, the last rung, leaves recordings out.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
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
from resonance.data.textfile import write_text_atomic
from resonance.errors import OutOfMemoryError, SmallerSettingsError
from resonance.messages import _
from resonance.model.memory import predict
from resonance.model.memory_full import is_memory_full
from resonance.model.precision import training_precision
from resonance.model.rungs import Rung, below, job_for, rung_of
from resonance.model.runs import RunFolder
from resonance.model.sizes import PUBLISHED, USUAL, WhisperShape
from resonance.ranks import Ranks
from resonance.train import progress, resume, together
from resonance.train.rows import Rows
from resonance.train.trainer import WhisperTrainer
from resonance.units import GIBIBYTE

Phase = Literal["training", "evaluation"]
SMALLER = 0.8  # of the memory: a model that takes more than that is no way out
FITTED_FILE = "fitted.json"  # in a run folder: the settings that the ladder came to
CHANGED = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "quantization"),
    *("max_audio_len", "per_device_eval_batch_size"),
)
SHRINKING = ("per_device_train_batch_size", "max_audio_len", "per_device_eval_batch_size")
LEFT_OUT = 0.1  # share of the recordings that shorter audio may cost


class MemoryFull(Exception):  # noqa: N818 - control flow: it is answered by the next rung
    """Memory ran out in `phase` at `step`; a single process has saved the run as it was before."""

    def __init__(self, phase: Phase, step: int, shape: WhisperShape) -> None:
        self.phase: Phase = phase
        self.step = step
        self.shape = shape


def release() -> None:
    """Give back what the failed attempt held. To be called when nothing refers to its trainer any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


@dataclass(frozen=True, slots=True)
class RandomState:
    """All generators that a step draws from."""

    python: Any
    numpy: Any
    processor: Tensor
    cuda: list[Tensor]
    apple: Tensor | None

    @classmethod
    def now(cls) -> RandomState:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        apple = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, apple)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.processor)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.apple is not None:
            torch.mps.set_rng_state(self.apple)


class StepStart(TrainerCallback):  # type: ignore[misc]
    """Remembers the random state in which the step under way began, and whether its update has."""

    def __init__(self) -> None:
        self.state: RandomState | None = None
        self.updating = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state = RandomState.now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updating = True

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.updating = False

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
        phase: Phase = "evaluation" if trainer.evaluating else "training"
        full = MemoryFull(phase, trainer.state.global_step, shape)
        traceback.clear_frames(error.__traceback__)  # they hold the failed step's tensors, and saving needs room
    else:
        return
    if trainer.args.world_size > 1:  # the other processes wait inside this step, and saving takes all of them
        raise full
    trainer.model.zero_grad(set_to_none=True)
    release()
    if not (start and start.updating):  # some optimisers change tensor by tensor: back to the last checkpoint then
        if start and start.state:
            start.state.restore()
        saved = trainer.save_now()
        if full.phase == "evaluation":
            (saved / resume.UNMEASURED_FILE).touch()
    raise full


@contextlib.contextmanager
def loading(name: str) -> Iterator[None]:
    """Say what to do where not even the weights find room. No rung helps against that."""
    try:
        yield
    except Exception as error:
        if not is_memory_full(error):
            raise
        raise OutOfMemoryError(
            _(
                "There is too little free memory for the weights of {name}. `nvidia-smi` shows what other programs hold; "
                "else take a smaller model, or --use_4bit."
            ).format(name=name)
        ) from error


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
        text = _("Out of memory at step {step}. Going on with {changes}: the same recordings, nothing lost.")
        left_out = 0
        if "max_audio_len" in changes:
            text = _(
                "Out of memory at step {step}. Going on with {changes}: {count} of {total} recordings are left out."
            )
            left_out = len(rows.train) - len(rows.up_to(changes["max_audio_len"]).train)
        self.console.print(
            text.format(
                step=full.step,
                changes=", ".join(f"{name} {value}" for name, value in changes.items()),
                count=left_out,
                total=len(rows.train),
            ),
            style="yellow",
            soft_wrap=True,
        )
        progress.append_event(self.run.events, {"step": full.step, "out_of_memory": full.phase, **changes})
        config = config.model_copy(update={**changes, "resume": True})
        fitted = {name: getattr(config, name) for name in CHANGED}
        write_text_atomic(self.run.path / FITTED_FILE, [json.dumps(fitted, indent=1)])
        return config

    def for_all(self, config: TrainConfig) -> SmallerSettingsError:
        """What one of several processes ends with: all have to be started again with the settings that are saved now."""
        return SmallerSettingsError(
            _(
                "Out of memory. {settings} are saved in {path}: started again with --resume, the training goes on from its "
                "last checkpoint with them."
            ).format(settings=flags(config), path=self.run.path / FITTED_FILE)
        )

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
        now = standing(config, rows)

        def takes(rung: Rung) -> int:
            return training_bytes(config, rows, full.shape, rung)

        for rung in below(now, may_quantize=config.finetuning == "lora" and can_quantize(), takes=takes):
            kept = len(rows.up_to(rung.max_audio_len).train)
            if takes(rung) < takes(now) and kept >= (1 - LEFT_OUT) * len(rows.train):
                yield differences(now, rung)

    def _nothing_left(self, config: TrainConfig, rows: Rows, full: MemoryFull) -> str:
        text = _("Memory ran out at step {step}, also with the smallest settings. Tried: {tried}.").format(
            step=full.step, tried="; ".join(self.tried)
        )
        lines = [text]
        if full.phase == "evaluation":
            lines.append(
                _(
                    "Measuring takes less with --generation_num_beams 1, a smaller --generation_max_length, or none of it with --eval_strategy no."
                )
            )
        now = training_bytes(config, rows, full.shape, standing(config, rows))
        for size in USUAL:
            needed = training_bytes(config, rows, PUBLISHED[size], standing(config, rows))
            if needed < SMALLER * now:
                lines.append(
                    _(
                        "A smaller model needs less: openai/whisper-{size} about {needed:.1f} GiB in place of {least:.1f}."
                    ).format(size=size, needed=needed / GIBIBYTE, least=now / GIBIBYTE)
                )
                break
        lines.append(_("The checkpoints are kept: --resume goes on where memory is larger."))
        return " ".join(lines)


def resumed(config: TrainConfig, run: RunFolder, mine: Ranks) -> TrainConfig:
    """`config` with the settings that an earlier part of the run came down to, whatever the command line repeats.

    Of several processes the one whose memory ran out has written them, perhaps on a disk that the others do not see.
    """
    file = run.path / FITTED_FILE
    found = json.loads(file.read_text(encoding="utf-8")) if config.resume and file.is_file() else None
    known = [fitted for fitted in together.gathered(mine, found) if fitted]
    if not known:
        return config
    fitted = min(known, key=lambda fitted: [fitted[name] for name in SHRINKING])
    return config.model_copy(update={name: fitted[name] for name in CHANGED if name in fitted})


def standing(config: TrainConfig, rows: Rows) -> Rung:
    return rung_of(config, max((row.duration or 0.0 for row in rows.train), default=config.max_audio_len))


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
    values = {name: getattr(config, name) for name in CHANGED}
    return " ".join(
        f"--{name} {str(value).lower() if isinstance(value, bool) else value}" for name, value in values.items()
    )
