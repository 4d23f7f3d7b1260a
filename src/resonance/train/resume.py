"""Continuing a run: what may differ from its first start, and the end of a training whose steps are all done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from resonance.config import TrainConfig, effective_batch
from resonance.config_io import load_yaml
from resonance.data.formats import load_manifest
from resonance.data.manifest import Utterance
from resonance.errors import ConfigError, DataError
from resonance.messages import _
from resonance.model.adapters import read_info
from resonance.model.checkpoints import DAMAGED_FILE, is_complete, processes_of, set_aside_damaged
from resonance.model.runs import RunFolder
from resonance.train.rows import Rows
from resonance.train.stream_rows import check_stream
from resonance.train.trainer import WhisperTrainer

UNMEASURED_FILE = "unmeasured"  # in a checkpoint: a signal stopped the measuring of its step
# Everything else shapes the weights, or what "best" is measured on: changed in the middle, it would make a result that
# its own settings do not describe. Where recordings lie may change; `check_rows` sees whether they are the same ones.
FREE = frozenset(
    {
        *("output_dir", "auto", "resume", "cache_dir", "feature_cache_dir"),
        *("train_file", "validation_file", "dataset_dir", "json_file"),
        *("max_steps", "num_train_epochs", "early_stopping_patience", "load_best_model_at_end"),
        *("eval_strategy", "eval_steps", "save_steps", "save_total_limit", "logging_steps"),
        *("per_device_train_batch_size", "gradient_accumulation_steps"),  # their product is compared
        *("per_device_eval_batch_size", "dataloader_num_workers", "gradient_checkpointing"),
        "skip_broken",
        *("use_wandb", "wandb_project", "run_name"),
        *("nproc", "nnodes", "node_rank", "rdzv", "max_restarts", "deepspeed", "fsdp"),
    }
)


def check_checkpoints(run: RunFolder, console: Console) -> None:
    """Set aside what is torn or damaged, and say so: the training goes on from the newest checkpoint that is as written."""
    for folder in run.checkpoints.glob("checkpoint-*"):
        if not is_complete(folder) and not (folder / DAMAGED_FILE).exists():
            console.print(
                _("{folder} was not written to its end and is not used.").format(folder=folder),
                style="yellow",
                soft_wrap=True,
            )
    for folder, file in set_aside_damaged(run.checkpoints):
        console.print(
            _("{folder} is damaged ({file} has changed since it was written) and is not used.").format(
                folder=folder, file=file
            ),
            style="yellow",
            soft_wrap=True,
        )


def check_settings(config: TrainConfig, run: RunFolder, processes: int) -> None:
    """Raise ConfigError naming the settings that differ from those of the checkpoints in `run`."""
    latest = run.latest_checkpoint()
    if latest is None or not run.config.is_file():
        return
    lines = [
        _("  {name}: {before} before, {now} now").format(name=name, before=before, now=now)
        for name, before, now in _differences(
            load_yaml(TrainConfig, run.config), config, processes_of(latest), processes
        )
    ]
    if lines:
        head = _(
            "{path}: this training was begun with other settings. Continue it with the old ones, or choose another "
            "--output_dir for a new training."
        ).format(path=run.path)
        raise ConfigError(["\n".join([head, *lines])])


def _differences(
    saved: TrainConfig, config: TrainConfig, processes_before: int, processes: int
) -> Iterator[tuple[str, Any, Any]]:
    for name in TrainConfig.model_fields:
        before, now = getattr(saved, name), getattr(config, name)
        if name not in FREE and before != now:
            yield name, before, now
    before, now = effective_batch(saved, processes_before), effective_batch(config, processes)
    if before != now:
        yield "per_device_train_batch_size x gradient_accumulation_steps x processes", before, now


def check_rows(rows: Rows, run: RunFolder) -> None:
    """Raise DataError when the recordings are not those that the checkpoints in `run` were trained and measured on."""
    if run.latest_checkpoint() is None:
        return
    lists = [("validation_file", run.held_out_rows, rows.held_out)]
    if rows.stream:
        check_stream(rows.stream, run)
    else:
        lists.insert(0, ("train_file", run.train_rows, rows.train))
    for setting, path, now in lists:
        before = load_manifest(path).utterances if path.is_file() else []
        changed = _identities(before) ^ _identities(now)
        if changed:
            raise DataError(
                _(
                    "{path}: this training was begun with other recordings or transcripts ({setting}): {before} before, "
                    "{now} now, {changed} in one of the two only (such as {name}). Continue it with the old ones, which "
                    "{saved} lists, or choose another --output_dir for a new training."
                ).format(
                    path=run.path,
                    setting=setting,
                    before=len(before),
                    now=len(now),
                    changed=len(changed),
                    name=min(changed)[0],
                    saved=path,
                )
            )


def _identities(rows: Sequence[Utterance]) -> set[tuple[str, float, str]]:
    return {(Path(row.audio).name, row.start, row.text) for row in rows}


def nothing_left(config: TrainConfig, run: RunFolder) -> bool:
    """Whether `run` has a result already, and `config` asks for no more steps than that was made with."""
    if run.result is None:
        return False
    made = read_info(run.result).settings
    if config.early_stopping_patience != made["early_stopping_patience"]:
        return False
    if config.max_steps is None or made["max_steps"] is None:
        same_kind = bool(config.max_steps == made["max_steps"])
        return same_kind and (config.num_train_epochs or 0) <= float(made["num_train_epochs"])
    return config.max_steps <= int(made["max_steps"])


def all_steps_done(trainer: WhisperTrainer, checkpoint: Path) -> bool:
    """Whether `checkpoint` holds the last step of the training that `trainer` is set up for."""
    planned: int = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return bool(_state(checkpoint).global_step >= planned)


def finish(trainer: WhisperTrainer, checkpoint: Path) -> None:
    """Bring `trainer` to where it ends after the last step, which `checkpoint` holds. Trainer itself would add a step.

    Measures that step if a signal had stopped the measuring, and loads the best checkpoint where that was asked for.
    """
    trainer.state = _state(checkpoint)
    trainer._load_from_checkpoint(str(checkpoint))
    evaluates = trainer.eval_dataset is not None and trainer.args.eval_strategy != "no"
    measured = any("eval_loss" in row and row["step"] == trainer.state.global_step for row in trainer.state.log_history)
    # DeepSpeed and FSDP measure and load through an engine, which only a training has.
    divided = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if evaluates and not measured and not divided:
        trainer._determine_best_metric(trainer.evaluate(), None)
    best = checkpoint.with_name(f"checkpoint-{trainer.state.best_global_step}")  # the folder may have moved since
    if trainer.args.load_best_model_at_end and best.is_dir():
        trainer.state.best_model_checkpoint = str(best)
        if divided:
            trainer._load_from_checkpoint(str(best))
        else:
            trainer._load_best_model()


def measure_missed(trainer: WhisperTrainer, checkpoint: Path) -> None:
    """Measure the step of `checkpoint` if a signal had stopped the measuring: it may be the best one.

    Nothing is written to the checkpoint; the score is carried into the training that goes on from it.
    """
    if not (checkpoint / UNMEASURED_FILE).is_file() or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    trainer.state = _state(checkpoint)
    trainer._load_from_checkpoint(str(checkpoint))
    trainer._determine_best_metric(trainer.evaluate_before_training(), None)
    trainer.callback_handler.callbacks.insert(0, _CarriedOver(trainer.state))  # early stopping counts what it brings


class _CarriedOver(TrainerCallback):  # type: ignore[misc]
    """Puts a measurement made before training into the state that Trainer reads from the checkpoint."""

    def __init__(self, measured: TrainerState) -> None:
        self.measured = measured

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.log_history = list(self.measured.log_history)
        state.best_metric, state.best_global_step = self.measured.best_metric, self.measured.best_global_step


class NewIntervals(TrainerCallback):  # type: ignore[misc]
    """Steps between logs, measurements and checkpoints as given now; Trainer would keep those of the checkpoint."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class EarlyStopping(EarlyStoppingCallback):  # type: ignore[misc]
    """Goes on counting where the run stopped; transformers' own begins at zero again."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = sum(
            args.metric_for_best_model in row and row["step"] > (state.best_global_step or 0)
            for row in state.log_history
        )


def _state(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
