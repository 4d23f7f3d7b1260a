"""Seq2SeqTrainer, corrected for Whisper: the loss, the order of clips, evaluation by real generation, safe checkpoints."""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from resonance.data.batches import ClipDataset, InOrderSampler, LengthGroupedSampler
from resonance.data.tokens import IGNORED_LABEL
from resonance.data.workers import outliving_signals
from resonance.errors import DataError, RunFolderError
from resonance.messages import _
from resonance.model.checkpoints import PROCESSES_FILE, is_complete, mark_complete, rotate
from resonance.model.memory import CUDA_CONTEXT
from resonance.model.runs import write_failure
from resonance.train.streaming import StreamLoader, Taken
from resonance.transcribe.decoding import decode
from resonance.units import GIBIBYTE


def label_token_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None, *, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropy summed over label tokens, divided by the label tokens of the whole effective batch.

    outputs.logits: [batch, tokens, vocabulary]; labels: [batch, tokens], -100 where nothing is to be predicted. Trainer
    counts `num_items_in_batch` over all accumulation steps and processes, so that 8x1, 4x2 and two processes with 4 each
    give the same gradient. Whisper's own loss is a mean per micro-batch, which Trainer then adds up: 2x4 reports four times
    the loss of 8x1.
    """
    logits = outputs.logits.float().flatten(0, 1)
    total = torch.nn.functional.cross_entropy(
        logits, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="sum", label_smoothing=label_smoothing
    )
    return total / (num_items_in_batch if num_items_in_batch is not None else labels.ne(IGNORED_LABEL).sum())


class WhisperTrainer(Seq2SeqTrainer):  # type: ignore[misc]
    """Trains on `ClipDataset`s; what it changes is what `resonance.train` documents in docs/explanation/training.md."""

    def __init__(
        self,
        *,
        train_durations: Sequence[float],
        prompt_length: int,
        num_beams: int,
        max_length: int,
        label_smoothing: float,
        keep_checkpoints: int | None,
        stream: StreamLoader | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            compute_loss_func=functools.partial(label_token_loss, label_smoothing=label_smoothing), **kwargs
        )
        world = self.args.world_size
        group = self.args.train_batch_size * self.args.gradient_accumulation_steps * world
        together = self.args.train_batch_size * world if world > 1 else 1
        self.sampler = LengthGroupedSampler(train_durations, group, self.args.seed, together)
        self.stream = stream
        self.prompt_length = prompt_length
        self.num_beams = num_beams
        self.max_length = max_length
        self.keep_checkpoints = keep_checkpoints
        self.metric = (self.args.metric_for_best_model or "").removeprefix("eval_")
        self.meter = Meter(group)
        self.evaluating = False  # stays set where evaluate() raised
        self.remove_callback(PrinterCallback)  # our progress line says it in words
        self.add_callback(_WhereItIs(self.sampler, self.meter))
        if stream:
            self.args.ignore_data_skip = True  # the stream goes on by itself where the checkpoint says
            self.add_callback(Taken(stream))

    def get_train_dataloader(self) -> Any:
        """A stream as it is: accelerate would read it on one rank and send the batches to the others."""
        return self.stream or outliving_signals(super().get_train_dataloader())

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        if self.stream:
            self.stream.restore(Path(resume_from_checkpoint) if resume_from_checkpoint else None)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _get_train_sampler(self, train_dataset: ClipDataset | None = None) -> LengthGroupedSampler:
        return self.sampler

    def _get_eval_sampler(self, eval_dataset: ClipDataset) -> InOrderSampler:
        world = self.args.world_size
        together = self.args.eval_batch_size * world if world > 1 else 1
        return InOrderSampler(len(eval_dataset), together)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return outliving_signals(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        with self.meter.waiting(), clean_worker_errors():
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    def prediction_step(
        self, model: Any, inputs: dict[str, torch.Tensor], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss by teacher forcing and text by generation, both at the batch's own audio context."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with torch.inference_mode(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(inputs)).detach()
            if prediction_loss_only:
                return loss, None, None
            ids = decode(
                self.accelerator.unwrap_model(model),
                inputs["input_features"],
                inputs["decoder_input_ids"][:, : self.prompt_length].tolist(),
                num_beams=self.num_beams,
                max_length=self.max_length,
                by_transformers=self.is_deepspeed_enabled or self.is_fsdp_enabled,
            )
        return loss, ids, labels

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self.evaluating = True
        with self.meter.pausing(), clean_worker_errors():
            # Not Seq2SeqTrainer's: of several processes it counts the rows twice that fill up the last batches.
            metrics: dict[str, float] = Trainer.evaluate(self, *args, **kwargs)
        self.evaluating = False
        return metrics

    def evaluate_before_training(self) -> dict[str, float]:
        """`evaluate`, and the model as it was before. accelerate (1.15) marks what it prepares for an evaluation as
        prepared: trained after that, it is not wrapped in DDP, and each process learns from its own recordings alone.
        """
        metrics = self.evaluate()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # gives back the forward of full precision
        self.accelerator.free_memory()
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.meter.read(self.state.global_step))
        logs.update(memory_in_gib(self.args.device))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer does, then marked complete; older ones are removed only after that. A full disk stops the run."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with self.meter.pausing():
                if self.args.should_save:  # what a kill has left there is not to be mixed with what comes now
                    shutil.rmtree(folder, ignore_errors=True)
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)
                if self.stream:
                    self.stream.save(folder)
                self.accelerator.wait_for_everyone()  # each process writes its own random state into the folder
                if self.args.should_save:
                    (folder / PROCESSES_FILE).write_text(str(self.args.world_size), encoding="utf-8")
                    mark_complete(folder)
                self.accelerator.wait_for_everyone()  # to every process it is complete from here on
        except Exception as error:
            reason = write_failure(error)
            if reason is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            raise RunFolderError(
                _(
                    "The checkpoint of step {step} could not be written to {folder}: {reason}. Free some space, then "
                    "continue from the last checkpoint with --resume."
                ).format(step=self.state.global_step, folder=folder.parent, reason=reason)
            ) from error
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(folder.parent, self.keep_checkpoints, [folder, *([Path(best)] if best else [])])

    def gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """All weights where the processes hold a part each (ZeRO-3, FSDP), else None. To be called by all of them."""
        # Where nothing was trained, they lie as they were loaded. FSDP divides the model itself, DeepSpeed wraps it.
        by_fsdp = self.is_fsdp_enabled and isinstance(self.model, torch.distributed.fsdp.FSDPModule)
        by_deepspeed = (
            self.is_deepspeed_enabled and is_deepspeed_zero3_enabled() and self.model_wrapped is not self.model
        )
        if not by_fsdp and not by_deepspeed:
            return None
        state: dict[str, torch.Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        # Two copies of the same values by now, of which a checkpoint has one.
        tied = getattr(self.model, "all_tied_weights_keys", {})
        return {name: weight for name, weight in state.items() if name not in tied}

    def kept_scores(self) -> dict[str, float]:
        """Scores of the checkpoint that the model now holds: the best one where that was asked for, else the last."""
        step = self.state.best_global_step if self.args.load_best_model_at_end else None
        found = [row for row in self.state.log_history if "eval_loss" in row and row["step"] == (step or row["step"])]
        if not found:
            return {}
        timing = (
            *("eval_runtime", "eval_samples_per_second", "eval_steps_per_second"),
            "eval_model_preparation_time",  # where Trainer measured before it trained
        )
        scores = {k.removeprefix("eval_"): v for k, v in found[-1].items() if k.startswith("eval_") and k not in timing}
        return {**scores, "step": found[-1]["step"]}

    def save_now(self) -> Path:
        """Write a checkpoint of the current step unless there is a complete one, and return its folder."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        complete = [is_complete(folder)]
        broadcast_object_list(complete)  # saving takes all processes or none
        if not complete[0]:
            self._save_checkpoint(self.model, None)
        return folder


class _WhereItIs(TrainerCallback):  # type: ignore[misc]
    """Tells the sampler its epoch and the meter its first step, also after resuming in the middle of an epoch."""

    def __init__(self, sampler: LengthGroupedSampler, meter: Meter) -> None:
        self.sampler = sampler
        self.meter = meter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meter.last_step = state.global_step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class Meter:
    """Samples per second, and the share of the time that training waited for data, since the last reading."""

    def __init__(self, samples_per_step: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.samples_per_step = samples_per_step
        self.clock = clock
        self.waited = self.paused = 0.0
        self.since: float | None = None
        self.last_step = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = self.clock()
        try:
            yield
        finally:
            if self.since is None:  # the first batch waits for the workers to start: not a running loader's wait
                self.since = self.clock()
            else:
                self.waited += self.clock() - began

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Time inside is neither training nor waiting: evaluation, saving."""
        began = self.clock()
        try:
            yield
        finally:
            if self.since is not None:  # else nothing is being measured yet: evaluated before training
                self.paused += self.clock() - began

    def read(self, step: int) -> dict[str, float]:
        now = self.clock()
        seconds = max(now - (self.since if self.since is not None else now) - self.paused, 1e-9)
        values = {
            "samples_per_second": round((step - self.last_step) * self.samples_per_step / seconds, 3),
            "data_wait": round(self.waited / seconds, 4),
        }
        self.since, self.waited, self.paused, self.last_step = now, 0.0, 0.0, step
        return values


def memory_in_gib(device: torch.device) -> dict[str, float]:
    """Memory in use now and at its peak: the device's, and this process' resident set."""
    process = psutil.Process().memory_info()
    rss = process.rss / GIBIBYTE
    if device.type == "cuda":
        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return {
            "memory_gib": round(now / GIBIBYTE, 3),
            "peak_memory_gib": round(peak / GIBIBYTE, 3),
            "rss_gib": round(rss, 3),
        }
    return {"memory_gib": round(rss, 3), "peak_memory_gib": round(peak_rss() / GIBIBYTE, 3), "rss_gib": round(rss, 3)}


def peak_memory(device: torch.device) -> int:
    """Bytes at the fullest as a plan counts them: on a GPU what nvidia-smi would show, else the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device)) + CUDA_CONTEXT
    return int(peak_rss())


def peak_rss() -> float:
    """The largest resident set this process ever had, in bytes."""
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset)  # type: ignore[attr-defined]
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux, bytes on macOS
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


@contextlib.contextmanager
def clean_worker_errors() -> Iterator[None]:
    """DataLoader puts a worker's traceback into the message of our errors; keep what the user needs."""
    try:
        yield
    except DataError as error:
        text = str(error)
        marker = f"{type(error).__name__}: "
        raise type(error)(text.rsplit(marker, 1)[-1].strip()) from None
