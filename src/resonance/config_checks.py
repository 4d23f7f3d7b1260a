"""Settings that are each right and do not go together. A message names the settings, their values and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from resonance.messages import _
from resonance.units import WINDOW_SECONDS

if TYPE_CHECKING:
    from resonance.config import TrainConfig

Problem = tuple[tuple[str, ...], str]  # names of the settings that disagree, and the message


def source_problems(
    file_name: str, file: Path | str | None, dataset_dir: Path | None, json_file: str | None
) -> Iterator[Problem]:
    """Recordings are listed by one of: a file, the name of a file inside `dataset_dir`."""
    if file and json_file:
        yield (
            (file_name, "json_file"),
            _("{name} and json_file both name the list of recordings. Keep one of them.").format(name=file_name),
        )
    elif json_file and not dataset_dir:
        yield (
            ("json_file", "dataset_dir"),
            _("json_file is the name of a file inside dataset_dir, which is missing. Give dataset_dir."),
        )
    elif not file and not json_file:
        yield (
            (file_name, "dataset_dir", "json_file"),
            _(
                "{name} is needed: the file that lists recordings and transcripts (or dataset_dir with json_file)."
            ).format(name=file_name),
        )


def train_problems(c: TrainConfig, *, needs_source: bool = True) -> Iterator[Problem]:
    """Everything in `c` that is right alone and wrong together."""
    if needs_source:
        yield from source_problems("train_file", c.train_file, c.dataset_dir, c.json_file)
    yield from _english_only_problems(c)
    yield from _streaming_problems(c)
    if c.quantization != "none" and c.finetuning != "lora":
        yield (
            ("quantization", "finetuning"),
            _(
                "quantization {quantization} holds weights that cannot be trained, but finetuning {finetuning} "
                "trains them. Give finetuning lora or quantization none."
            ).format(quantization=c.quantization, finetuning=c.finetuning),
        )
    if c.min_audio_len >= c.max_audio_len:
        yield (
            ("min_audio_len", "max_audio_len"),
            _("min_audio_len {shortest:g} is not below max_audio_len {longest:g}: no recording would be left.").format(
                shortest=c.min_audio_len, longest=c.max_audio_len
            ),
        )
    yield from _cache_problems(c)
    yield from _context_problems(c)
    yield from _evaluation_problems(c)
    if c.steps_are_settled and c.max_steps is not None and c.warmup_steps >= c.max_steps:
        yield (
            ("warmup_steps", "max_steps", "num_train_epochs"),
            _(
                "warmup_steps {warmup:g} is not below max_steps {steps}: the learning rate would never reach "
                "its value. Give warmup_steps 0.1 for a tenth of all steps."
            ).format(warmup=c.warmup_steps, steps=c.max_steps),
        )
    yield from _machine_problems(c)
    if c.wandb_project is not None and not c.use_wandb:
        yield (
            ("wandb_project", "use_wandb"),
            _("wandb_project is given, but use_wandb is not: nothing would be sent. Give use_wandb too."),
        )


def _streaming_problems(c: TrainConfig) -> Iterator[Problem]:
    if not c.streaming:
        for name in ("train_file", "validation_file"):
            place = getattr(c, name)
            if isinstance(place, str) and c.streaming_is_settled:
                yield (
                    (name, "streaming"),
                    _("{name} {place} lies on another machine. Add --streaming, or download it.").format(
                        name=name, place=place
                    ),
                )
        if c.skip_broken and c.streaming_is_settled:
            yield (
                ("skip_broken", "streaming"),
                _("skip_broken is for streamed data, but streaming is not given. Give streaming too, or leave it out."),
            )
        return
    if c.num_train_epochs is not None:
        yield (
            ("num_train_epochs", "streaming"),
            _(
                "streaming trains for max_steps updates; num_train_epochs needs all data listed. Give max_steps instead."
            ),
        )
    if c.max_train_samples is not None:
        yield (
            ("max_train_samples", "streaming"),
            _("max_train_samples takes the first rows of a list, which streaming does not make. Leave it out."),
        )
    if c.eval_strategy == "epoch":
        yield (
            ("eval_strategy", "streaming"),
            _("eval_strategy epoch measures after each pass, which a stream does not count. Give eval_strategy steps."),
        )
    if c.split_by == "within_sentence" and c.validation_split and not c.validation_file:
        yield (
            ("split_by", "streaming"),
            _(
                "split_by within_sentence has to know all recordings of a sentence, which streaming does not. Give "
                "split_by sentence or a validation_file."
            ),
        )


def _english_only_problems(c: TrainConfig) -> Iterator[Problem]:
    if not c.model_name_or_path.rstrip("/").endswith(".en"):
        return
    if c.language not in (None, "en"):
        yield (
            ("model_name_or_path", "language"),
            _("{model} knows only English, but language is {language}. Give the model without .en at its end.").format(
                model=c.model_name_or_path, language=c.language
            ),
        )
    if c.task == "translate":
        yield (
            ("model_name_or_path", "task"),
            _("{model} knows only English and cannot translate. Give the model without .en at its end.").format(
                model=c.model_name_or_path
            ),
        )


def _machine_problems(c: TrainConfig) -> Iterator[Problem]:
    if c.rdzv is None and c.nnodes > 1:
        yield (
            ("nnodes", "rdzv"),
            _("nnodes {count} needs rdzv: address and port where the machines meet, such as 10.0.0.1:29400.").format(
                count=c.nnodes
            ),
        )
    elif c.rdzv is not None and not re.fullmatch(r".+:\d+", c.rdzv):
        yield (
            ("rdzv",),
            _("rdzv {value} is not an address with a port, such as 10.0.0.1:29400.").format(value=c.rdzv),
        )
    if c.deepspeed is not None and c.fsdp:
        yield ("deepspeed", "fsdp"), _("deepspeed and fsdp both divide the memory among processes. Keep one of them.")
    if c.quantization != "none" and (c.fsdp or c.deepspeed == "zero3"):
        yield (
            ("quantization", "fsdp", "deepspeed"),
            _(
                "quantization {quantization} does not go with fsdp or deepspeed zero3, which divide the weights. Give zero2, "
                "or quantization none."
            ).format(quantization=c.quantization),
        )
    if c.node_rank >= c.nnodes:
        yield (
            ("node_rank", "nnodes"),
            _("node_rank {rank} is not below nnodes {count}: the machines are counted from 0.").format(
                rank=c.node_rank, count=c.nnodes
            ),
        )


def _cache_problems(c: TrainConfig) -> Iterator[Problem]:
    if c.feature_cache == "none":
        if c.feature_cache_dir is not None:
            yield (
                ("feature_cache_dir", "feature_cache"),
                _(
                    "feature_cache_dir is given, but feature_cache is none: nothing would be kept there. Keep one of them."
                ),
            )
        return
    if c.streaming:
        yield (
            ("feature_cache", "streaming"),
            _(
                "feature_cache disk is for recordings that are listed, but streaming reads them once. Leave one of them out."
            ),
        )
    for name in ("speed_perturbation", "gain_db"):
        if getattr(c, name):
            yield (
                ("feature_cache", name),
                _(
                    "feature_cache disk keeps each recording as it is, but {name} changes it in every pass. Leave one of "
                    "them out."
                ).format(name=name),
            )


def _context_problems(c: TrainConfig) -> Iterator[Problem]:
    if c.context_alignment_steps and c.whole_window:
        yield (
            ("context_alignment_steps", "audio_context"),
            _(
                "context_alignment_steps {steps} fits a short audio context to 30 seconds, but audio_context is "
                "{context}. Leave context_alignment_steps out, or give audio_context auto."
            ).format(steps=c.context_alignment_steps, context=c.audio_context),
        )
    if c.context_alignment_steps and c.finetuning == "frozen_encoder":
        yield (
            ("context_alignment_steps", "finetuning"),
            _(
                "context_alignment_steps {steps} changes the encoder, which finetuning frozen_encoder leaves as it is. "
                "Leave context_alignment_steps out, or give finetuning lora or full."
            ).format(steps=c.context_alignment_steps),
        )
    if isinstance(c.audio_context, str):
        return
    room = round(c.audio_context - c.audio_margin, 2)
    if room <= c.min_audio_len:
        yield (
            ("audio_context", "audio_margin"),
            _(
                "audio_context {context:g} s leaves {room:g} s for speech behind an audio_margin of {margin:g} s. "
                "Give a longer audio_context."
            ).format(context=c.audio_context, room=max(room, 0), margin=c.audio_margin),
        )
    elif c.audio_context < WINDOW_SECONDS and room < c.max_audio_len:
        yield (
            ("audio_context", "max_audio_len"),
            _(
                "audio_context {context:g} s would cut off recordings of up to max_audio_len {longest:g} s. "
                "Give max_audio_len {room:g} or less (audio_context minus audio_margin), or a longer audio_context."
            ).format(context=c.audio_context, longest=c.max_audio_len, room=room),
        )


def _evaluation_problems(c: TrainConfig) -> Iterator[Problem]:
    if c.eval_strategy == "no":
        if c.load_best_model_at_end:
            yield (
                ("load_best_model_at_end", "eval_strategy"),
                _("load_best_model_at_end needs measurements, but eval_strategy is no. Change one of them."),
            )
        if c.early_stopping_patience is not None:
            yield (
                ("early_stopping_patience", "eval_strategy"),
                _("early_stopping_patience needs measurements, but eval_strategy is no. Change one of them."),
            )
        return
    if not c.validation_file and not c.validation_split:
        yield (
            ("eval_strategy", "validation_file", "validation_split"),
            _(
                "eval_strategy {strategy} needs data to measure on, but validation_split is 0. "
                "Give validation_file or a validation_split above 0."
            ).format(strategy=c.eval_strategy),
        )
    if c.steps_are_settled and c.eval_strategy == "steps" and c.max_steps is not None and c.eval_steps > c.max_steps:
        yield (
            ("eval_steps", "max_steps", "num_train_epochs"),
            _(
                "eval_steps {every} is more than max_steps {steps}: nothing would ever be measured. "
                "Give less, or leave eval_steps out."
            ).format(every=c.eval_steps, steps=c.max_steps),
        )
    if c.load_best_model_at_end and c.save_steps is not None:
        if c.eval_strategy == "epoch":
            yield (
                ("save_steps", "eval_strategy"),
                _(
                    "save_steps counts steps, but eval_strategy is epoch, so that the best checkpoint could not "
                    "be kept. Leave save_steps out or give eval_strategy steps."
                ),
            )
        elif c.save_steps % c.eval_steps:
            yield (
                ("save_steps", "eval_steps"),
                _(
                    "save_steps {save} is not a multiple of eval_steps {every}, so that the best checkpoint could "
                    "not be kept. Leave save_steps out or give a multiple."
                ).format(save=c.save_steps, every=c.eval_steps),
            )
