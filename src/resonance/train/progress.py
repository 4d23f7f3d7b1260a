"""What a person and a program see while training: the progress line, `events.jsonl`, and a clean stop on a signal."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from resonance.config import TrainConfig
from resonance.data.textfile import write_text_atomic
from resonance.errors import MissingExtraError
from resonance.messages import _
from resonance.model.runs import RunFolder, read_events
from resonance.ranks import Ranks
from resonance.train import together


class EventLog(TrainerCallback):  # type: ignore[misc]
    """Appends every log row to `events.jsonl` as one JSON object. Rows behind a resumed step are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        kept = [json.dumps(row) + "\n" for row in read_events(self.path) if row["step"] <= state.global_step]
        # Not only when rows are dropped: the next row would go into a last line that a kill has torn.
        if "".join(kept) != self.path.read_text(encoding="utf-8"):
            write_text_atomic(self.path, kept)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            append_event(self.path, {"step": state.global_step, **logs})


def append_event(path: Path, row: Mapping[str, Any]) -> None:
    """One JSON object in a line. What is not a number is null: JSON has no NaN, and strict readers refuse it."""
    row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, allow_nan=False) + "\n")


class ProgressLine(TrainerCallback):  # type: ignore[misc]
    """One line that moves on a terminal; one line per log row elsewhere."""

    def __init__(self, console: Console, metric: str) -> None:
        self.console = console
        self.metric = metric
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task: Any = None
        self.best: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.best = state.best_metric
        if state.is_world_process_zero and self.console.is_terminal:
            self.task = self.bar.add_task(_("training"), total=state.max_steps, completed=state.global_step, status="")
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        status = _(
            "loss {loss:.4f} · learning rate {rate:.2e} · {speed:.1f} clips/s · memory {now:.2f} (peak {peak:.2f}) GiB"
        ).format(
            loss=logs["loss"],
            rate=logs["learning_rate"],
            speed=logs["samples_per_second"],
            now=logs["memory_gib"],
            peak=logs["peak_memory_gib"],
        )
        if self.task is not None:
            self.bar.update(self.task, status=status)
            return
        left = (state.max_steps - state.global_step) * args.train_batch_size * args.gradient_accumulation_steps
        minutes = left * args.world_size / max(logs["samples_per_second"], 1e-9) / 60
        self.console.print(
            _("step {step}/{total} · {status} · {minutes:.1f} min left").format(
                step=state.global_step, total=state.max_steps, status=status, minutes=minutes
            ),
            highlight=False,
            soft_wrap=True,
        )

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not metrics or f"eval_{self.metric}" not in metrics:
            return
        value = metrics[f"eval_{self.metric}"]
        best = self.best is None or value < self.best
        self.best = value if best else self.best
        self.console.print(
            _("step {step}: {metric} {value:.1%}, phrases exactly right {exact:.1%}, loss {loss:.4f}").format(
                step=state.global_step,
                metric=self.metric.upper(),
                value=value,
                exact=metrics["eval_exact_phrase_accuracy"],
                loss=metrics["eval_loss"],
            )
            + (_("  (best so far)") if best else ""),
            highlight=False,
            soft_wrap=True,
        )

    def stop(self) -> None:
        if self.task is not None:
            self.bar.stop()
            self.task = None


class StopOnSignal(TrainerCallback):  # type: ignore[misc]
    """Turns SIGINT and SIGTERM into a checkpoint and a clean end after the step under way.

    Of several processes all stop after the same step, also where only some have received the signal.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.agreed: int | None = None  # what all of them know of
        self.unmeasured = False  # whether the step it came in was to be measured

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block. A second one ends the process at once."""
        owner = os.getpid()
        before: dict[int, Any] = {}

        def handle(number: int, frame: FrameType | None) -> None:
            # A DataLoader worker inherits this handler. Schedulers signal whole process groups: the workers go on until
            # the main process has saved, and end with it.
            if os.getpid() != owner:
                return
            if self.received is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.received = number

        for wanted in (signal.SIGINT, signal.SIGTERM):
            before[wanted] = signal.signal(wanted, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self) -> bool:
        """Whether to stop. Every process asks after the same steps."""
        self.agreed = together.largest(self.received or 0) or None
        return self.agreed is not None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree():
            self.unmeasured = control.should_evaluate
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.agree():
            raise StopNow


class StopNow(Exception):  # noqa: N818 - control flow out of an evaluation, not a fault
    """A signal arrived while evaluating."""


class LastStep(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves the last step too, whatever `eval_steps` divides."""

    def __init__(self, evaluate: bool) -> None:
        self.evaluate = evaluate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_save = True
            control.should_evaluate = self.evaluate and args.eval_strategy != "no"


def callbacks(run: RunFolder, config: TrainConfig, mine: Ranks) -> list[TrainerCallback]:
    """`events.jsonl`, TensorBoard under `runs/`, and Weights & Biases where asked for: by the main process only."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback, WandbCallback

    chosen: list[TrainerCallback] = [LastStep(evaluate=config.eval_strategy != "no")]
    if mine.main:
        chosen += [EventLog(run.events), TensorBoardCallback(SummaryWriter(log_dir=str(run.path / "runs")))]
    if config.use_wandb:
        if importlib.util.find_spec("wandb") is None:
            raise MissingExtraError(
                _('--use_wandb needs the wandb package: pip install "resonance-asr[wandb]", then `wandb login`.')
            )
        if config.wandb_project:
            os.environ["WANDB_PROJECT"] = config.wandb_project  # where transformers' callback looks for it
        if mine.main:
            chosen.append(WandbCallback())
    return chosen
