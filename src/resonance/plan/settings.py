"""A plan as settings of `resonance train`, each with the reason for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from resonance.config import GOOD_EFFECTIVE_BATCH, TrainConfig
from resonance.config_types import ALL_LINEAR
from resonance.messages import _
from resonance.plan.choose import Plan
from resonance.plan.devices import Device
from resonance.plan.feature_cache import feature_cache
from resonance.plan.recordings import stream_reason
from resonance.units import GIBIBYTE, MEBIBYTE, POSITIONS_PER_SECOND


class Reasoned(NamedTuple):
    value: Any
    reason: str


def settings_of(plan: Plan, config: TrainConfig) -> dict[str, Reasoned]:
    """Every setting that the plan decides or that decides the plan; what the user gave is said to be theirs."""
    rung, recordings, device = plan.rung, plan.recordings, plan.device

    def choice(setting: str, value: Any, reason: str) -> tuple[str, Reasoned]:
        return setting, Reasoned(value, _("as you gave it") if setting in config.model_fields_set else reason)

    chosen = [
        choice(
            "model_name_or_path",
            plan.model,
            _("the largest that fits and that {hours:.1f} hours of speech can teach").format(hours=recordings.hours),
        ),
        choice("finetuning", plan.config.finetuning, method_reason(plan)),
        *(choice(*setting) for setting in method_settings(plan)),
        choice(
            "precision",
            plan.job.precision,
            _("what this GPU is good at") if device.kind == "cuda" else _("what works everywhere"),
        ),
        choice(
            "quantization",
            rung.quantization,
            _("the weights fit as they are, and are faster so")
            if rung.quantization == "none"
            else _("saves memory: nothing faster fits"),
        ),
        choice(
            "per_device_train_batch_size",
            rung.per_device_train_batch_size,
            _("the whole effective batch fits at once")
            if rung.gradient_accumulation_steps == 1
            else _("the fastest that fits {room:.1f} GiB").format(room=plan.room / GIBIBYTE),
        ),
        choice(
            "gradient_accumulation_steps",
            rung.gradient_accumulation_steps,
            batch_reason(plan.effective_batch),
        ),
        choice(
            "gradient_checkpointing",
            rung.gradient_checkpointing,
            _("saves memory, takes about a third longer") if rung.gradient_checkpointing else _("not needed"),
        ),
        choice("audio_context", config.audio_context, context_reason(plan)),
        choice(
            "max_steps",
            plan.steps,
            _("{clips} recordings, each heard about {times:.0f} times").format(
                clips=recordings.clips, times=plan.steps * plan.effective_batch / recordings.clips
            ),
        ),
        choice("dataloader_num_workers", workers(config, device), _("prepare audio while the model computes")),
        choice("feature_cache", *features_of(plan, config)),
    ]
    if reason := stream_reason(config):
        chosen.append(choice("streaming", True, reason))
    if plan.eval_steps:
        chosen += [
            choice(
                "eval_steps", plan.eval_steps, _("measures {count} recordings held out").format(count=plan.measured)
            ),
            choice(
                "per_device_eval_batch_size",
                plan.job.per_device_eval_batch_size,
                _("transcribes them, without a training's memory"),
            ),
        ]
        if plan.measured < recordings.held_out:
            chosen.append(choice("max_eval_samples", plan.measured, _("enough to find the best checkpoint")))
    if rung.max_audio_len < recordings.longest:
        left = sum(seconds > rung.max_audio_len for seconds in recordings.train_seconds)
        reason = _("longer ones do not fit: {count} of {total} recordings are left out")
        chosen.append(choice("max_audio_len", rung.max_audio_len, reason.format(count=left, total=recordings.clips)))
    return dict(chosen)


def method_reason(plan: Plan) -> str:
    if plan.config.finetuning == "lora":
        return _("trains a small addition to the model; the result has {size:.0f} MB").format(
            size=plan.memory.parts["adapters"] / MEBIBYTE
        )
    return _("{hours:.0f} hours are more than a small addition can hold, and the whole model fits").format(
        hours=plan.recordings.hours
    )


def method_settings(plan: Plan) -> Iterator[tuple[str, Any, str]]:
    """What goes with the way to train: setting, value, reason."""
    method = plan.config
    if method.finetuning == "lora":
        yield "lora_r", method.lora_r, _("wide enough for so much speech")
        yield "lora_alpha", method.lora_alpha, _("twice lora_r is usual")
        reason = (
            _("many hours teach all parts of a layer")
            if method.target_modules == [ALL_LINEAR]
            else _("enough for few hours, and the fastest")
        )
        yield "target_modules", ",".join(method.target_modules), reason  # as it is typed
    yield "learning_rate", method.learning_rate, _("usual for what is trained")


def batch_reason(batch: int) -> str:
    if batch not in GOOD_EFFECTIVE_BATCH:
        return _("makes an effective batch of {batch}").format(batch=batch)
    return _("makes an effective batch of {batch}; {low} to {high} works well").format(
        batch=batch, low=GOOD_EFFECTIVE_BATCH[0], high=GOOD_EFFECTIVE_BATCH[-1]
    )


def context_reason(plan: Plan) -> str:
    if plan.context.length == "full":
        return _("computes 30 s for every recording, however short")
    seconds = plan.context.positions(min(plan.rung.max_audio_len, plan.recordings.longest)) / POSITIONS_PER_SECOND
    return _("computes as long as the recordings are: up to {seconds:.1f} s of Whisper's 30").format(seconds=seconds)


def features_of(plan: Plan, config: TrainConfig) -> tuple[str, str]:
    """Whether features are kept on disk, and why."""
    if not config.model_fields_set.isdisjoint({"feature_cache", "feature_cache_dir"}):
        return config.feature_cache, _("as you gave it")
    if config.streaming or stream_reason(config):
        return "none", _("the data is streamed")
    learnt = plan.steps * plan.rung.effective_batch  # by each process, with workers of its own
    return feature_cache(
        config,
        plan.device,
        plan.recordings,
        plan.shape.num_mel_bins,
        passes=plan.steps * plan.effective_batch / plan.recordings.clips,
        clips_per_second=learnt / plan.duration.training,
        workers=workers(config, plan.device),
    )


def workers(config: TrainConfig, device: Device) -> int:
    """As given; else four where a GPU computes and the processor has nothing else to do, or what a processor can spare."""
    if "dataloader_num_workers" in config.model_fields_set:
        return config.dataloader_num_workers
    cores = (os.cpu_count() or 1) if device.here else 8
    return min(4, cores) if device.kind == "cuda" else min(2, cores - 1)
