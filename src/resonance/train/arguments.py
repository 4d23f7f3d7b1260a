"""Our settings as transformers' Seq2SeqTrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import Seq2SeqTrainingArguments

from resonance.config import TrainConfig, effective_batch
from resonance.errors import ConfigError
from resonance.messages import _
from resonance.model.precision import Precision
from resonance.ranks import Ranks
from resonance.train.sharding import sharding_arguments

METRIC_OF_UNIT = {"char": "cer", "word": "wer", "mixed": "mer"}


def best_metric(config: TrainConfig, unit: Literal["char", "word", "mixed"]) -> str:
    """The error rate that decides which checkpoint is best. `unit` is what the language's errors are counted in."""
    return METRIC_OF_UNIT[unit] if config.metric_for_best_model == "auto" else config.metric_for_best_model


def training_arguments(
    config: TrainConfig,
    checkpoints: Path,
    precision: Precision,
    *,
    metric: str | None,
    train_rows: int,
    on_cpu: bool,
    mine: Ranks,
) -> Seq2SeqTrainingArguments:
    """Arguments for Trainer. `metric` is None when nothing is held out."""
    per_epoch = max(-(-train_rows // effective_batch(config, mine.world)), 1)
    steps = config.max_steps or max(round(per_epoch * (config.num_train_epochs or 0)), 1)
    if config.warmup_steps >= max(steps, 2):
        raise ConfigError(
            [
                _(
                    "warmup_steps {warmup:g} is not below the {steps} steps of this training: the learning rate would never "
                    "reach its value. Give --warmup_steps 0.1 for a tenth of all steps."
                ).format(warmup=config.warmup_steps, steps=steps)
            ]
        )
    evaluates = metric is not None and config.eval_strategy != "no"
    strategy = config.eval_strategy if config.eval_strategy != "no" else "steps"
    eval_steps = min(config.eval_steps, steps)
    save_steps = min(config.save_steps or eval_steps, steps)
    best = evaluates and config.load_best_model_at_end
    ours = {"use_cpu": on_cpu, "ddp_find_unused_parameters": False, "save_on_each_node": mine.own_disk}
    passed = ours | sharding_arguments(config, on_cpu) | config.extra
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(checkpoints),
        max_steps=config.max_steps or -1,
        num_train_epochs=config.num_train_epochs or 1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        activation_checkpointing=config.gradient_checkpointing,
        # The reentrant kind needs inputs that require gradients, which a frozen encoder's do not.
        activation_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        dataloader_num_workers=config.dataloader_num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # our batches are not columns of a data set
        label_names=["labels"],
        predict_with_generate=True,
        eval_strategy=strategy if evaluates else "no",
        eval_steps=eval_steps,
        save_strategy=strategy if evaluates else "steps",
        save_steps=save_steps,
        save_total_limit=None,  # WhisperTrainer removes old checkpoints, after the new one is complete
        load_best_model_at_end=best,
        metric_for_best_model=f"eval_{metric}" if evaluates else None,
        greater_is_better=False,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        disable_tqdm=True,
        report_to="none",  # TensorBoard and W&B are added as callbacks, with their folders and projects
        run_name=config.run_name,
        **passed,
    )
    # One process uses one GPU: with more, Trainer would put the model into DataParallel, which is slower than one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
