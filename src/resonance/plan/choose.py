"""From recordings, model and device to settings: the fastest ones that fit, for the largest model that the data can feed.

What the user gave is kept; only what was left open is chosen. Every choice carries its reason.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from resonance.config import TrainConfig
from resonance.config_types import ALL_LINEAR
from resonance.data.audio_context import AudioContext
from resonance.model.job import TrainingJob
from resonance.model.memory import MemoryPlan, predict
from resonance.model.rungs import Rung, below, job_for, smaller_batches
from resonance.model.sizes import PUBLISHED, WhisperShape
from resonance.plan import calibration
from resonance.plan.devices import Device
from resonance.plan.recordings import Recordings
from resonance.plan.timing import SAVE_SECONDS, START_SECONDS, Duration, evaluation_seconds, step_seconds
from resonance.units import MEBIBYTE

# LoRA's trained weights for one token of the labels. It is where people put the borders of 10 and 50 hours: 40 gives small
# up to 10 hours of speech (q_proj and v_proj, rank 16, 3 tokens a second), then medium, large-v3 from 17 hours on.
WEIGHTS_A_TOKEN = 40
SMALLEST_BY_DATA = "small"  # with however few recordings: smaller ones are chosen for memory or time only
EFFECTIVE_BATCH, LARGE_EFFECTIVE_BATCH, LARGE_HOURS = 8, 16, 10
MOST_STEPS = 5000
MEASUREMENTS = 8  # while training, at most, where there are many steps
MOST_MEASURED = 500  # recordings that choose the best checkpoint; 500 tell 4 points apart
PASSES = 3  # through the recordings, where there are many
# What is trained, by the hours of speech. LoRA learns as much as full fine-tuning until the data is more than it can hold, and more
# on all linear layers than on attention alone (Schulman et al., "LoRA Without Regret", 2025, on language models). Where a few
# phrases are learnt, q_proj and v_proj do: on 190 recordings of a speaker of TORGO 59.0 % understood against 60.2 % with all
# (train/alignment.py), and the result is a sixth as large. The two borders are a judgement, not a measurement.
ALL_LINEAR_HOURS, FULL_HOURS = 10, 50
FULL_LEARNING_RATE = 1e-5  # as published recipes for Whisper, and the default of --finetuning full
# The rate: ten to twenty times that of full fine-tuning (the same paper); QLoRA's for all layers (Dettmers et al., 2023).
ALL_LINEAR_SETTINGS = {"target_modules": [ALL_LINEAR], "lora_r": 32, "lora_alpha": 64, "learning_rate": 2e-4}
# Who gives one of these has a low-rank addition in mind, or a learning rate that is right for one method only.
SETTLES_METHOD = frozenset({"finetuning", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "learning_rate"})
HOST_SECONDS_LIMIT = 6 * 3600  # on a processor, a smaller model is taken rather than a longer training
HOST_RUNTIME = 600 * MEBIBYTE  # Python with torch, transformers and peft imported, and two workers
FREE_SHARE = 0.92  # of the free memory that is planned with: the rest is for what else runs, and for our error
SHORTENS = 0.1  # share of the recordings that may be left out to fit a larger model


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings for `resonance train` and what they are predicted to take."""

    model: str
    shape: WhisperShape
    config: TrainConfig  # as given, with the way to train that was chosen
    device: Device
    recordings: Recordings
    rung: Rung
    context: AudioContext
    job: TrainingJob
    memory: MemoryPlan
    needed: int  # bytes of the device's memory, the driver's and the allocator's share included
    room: int  # bytes that are free for it
    duration: Duration
    steps: int
    eval_steps: int  # 0: nothing is measured while training
    measured: int  # recordings that each measurement transcribes
    learnt_from: int  # earlier trainings on this machine that corrected memory and time

    @property
    def effective_batch(self) -> int:
        """Of all processes."""
        return self.rung.effective_batch * self.config.processes

    @property
    def fits(self) -> bool:
        return self.needed <= self.room


def needed_bytes(memory: MemoryPlan, device: Device) -> int:
    """What has to be free on the device: on a GPU as nvidia-smi counts it, else the process."""
    return memory.on_card if device.kind == "cuda" else memory.peak + HOST_RUNTIME


def room_on(device: Device) -> int:
    return int(device.free * FREE_SHARE)


def best_plan(config: TrainConfig, shapes: dict[str, WhisperShape], device: Device, recordings: Recordings) -> Plan:
    """The plan for the largest of `shapes` (largest first) that the data can feed and the device can hold, trained in the way
    that learns most of those that fit.

    Where nothing fits, the least plan of the smallest model, whose `fits` is False.
    """
    last = list(shapes)[-1]
    names = list(
        itertools.dropwhile(lambda name: name != last and not fed_by(shapes[name], config, recordings), shapes)
    )
    methods = methods_for(config, recordings)
    for shorten in (False, True):
        for name, method in itertools.product(names, methods):
            plans = [plan for plan in plans_for(name, shapes[name], method, device, recordings, shorten) if plan.fits]
            if not plans:
                continue
            plan = min(plans, key=lambda plan: (-plan.effective_batch, plan.duration.total, plan.needed))
            too_long = device.kind == "cpu" and plan.duration.total > HOST_SECONDS_LIMIT
            if not (too_long and (name, method) != (last, methods[-1])):
                return plan
    least = itertools.chain.from_iterable(
        plans_for(last, shapes[last], methods[-1], device, recordings, shorten) for shorten in (False, True)
    )
    return min(least, key=lambda plan: plan.needed)


def methods_for(config: TrainConfig, recordings: Recordings) -> list[TrainConfig]:
    """`config` with each way to train that comes into question, the one that learns most first."""
    if not config.model_fields_set.isdisjoint(SETTLES_METHOD):
        return [config]
    changes: list[dict[str, Any]] = []
    if recordings.hours >= FULL_HOURS and config.quantization == "none":
        changes.append({"finetuning": "full", "learning_rate": FULL_LEARNING_RATE})
    if recordings.hours >= ALL_LINEAR_HOURS:
        changes.append(ALL_LINEAR_SETTINGS)
    return [*(with_method(config, **change) for change in changes), config]


def with_method(config: TrainConfig, **changes: Any) -> TrainConfig:
    """`config` trained another way, which counts as chosen, not as given."""
    changed = config.model_copy(update=changes)
    changed.model_fields_set.intersection_update(config.model_fields_set)
    return changed


def fed_by(shape: WhisperShape, config: TrainConfig, recordings: Recordings) -> bool:
    """Whether the labels can teach the weights that are trained: at most WEIGHTS_A_TOKEN for each token."""
    if shape.d_model <= PUBLISHED[SMALLEST_BY_DATA].d_model:
        return True
    trained = (
        predict(TrainingJob(shape, target_modules=tuple(config.target_modules), lora_r=config.lora_r)).adapters // 4
    )
    return trained <= WEIGHTS_A_TOKEN * sum(recordings.label_tokens)


def plans_for(
    name: str, shape: WhisperShape, config: TrainConfig, device: Device, recordings: Recordings, shorten: bool
) -> Iterator[Plan]:
    """A plan for each combination that the user left open. `shorten`: with the longest recordings left out."""
    for rung in open_rungs(config, recordings, device, shorten):
        yield plan_for(name, shape, config, device, recordings, rung)


def open_rungs(config: TrainConfig, recordings: Recordings, device: Device, shorten: bool) -> Iterator[Rung]:
    given = config.model_fields_set
    quantizations = [config.quantization]
    if "quantization" not in given and config.finetuning == "lora" and can_quantize(device):
        quantizations += ["8bit", "4bit"]
    total = EFFECTIVE_BATCH if recordings.hours < LARGE_HOURS else LARGE_EFFECTIVE_BATCH
    total = min(total, 1 << (max(recordings.clips, 1).bit_length() - 1))
    total = max(1, total // config.processes)  # each computes its share
    batch, times = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if "per_device_train_batch_size" in given:
        batches = [(batch, times if "gradient_accumulation_steps" in given else -(-total // batch))]
    elif "gradient_accumulation_steps" in given:
        first = max(1, total // times)
        batches = [(size, times) for size in (first, *smaller_batches(first))]
    else:
        batches = [(size, total // size) for size in (total, *smaller_batches(total))]
    checkpointing = [config.gradient_checkpointing]
    if "gradient_checkpointing" not in given:
        checkpointing = [False, True]
    longest = min(recordings.longest, config.max_audio_len)
    lengths = [longest]
    if shorten and "max_audio_len" not in given:
        start = Rung("none", 1, 1, True, longest)
        kept = recordings.train_seconds[int((1 - SHORTENS) * (recordings.clips - 1))]
        lengths = [r.max_audio_len for r in below(start, may_quantize=False) if r.max_audio_len >= kept]
    for seconds in lengths:
        for quantization in quantizations:
            for batch, accumulation in batches:
                for again in checkpointing:
                    yield Rung(quantization, batch, accumulation, again, seconds)


def can_quantize(device: Device) -> bool:
    """bitsandbytes is fast on NVIDIA's GPUs only."""
    return device.kind == "cuda" and (not device.here or importlib.util.find_spec("bitsandbytes") is not None)


def plan_for(
    name: str, shape: WhisperShape, config: TrainConfig, device: Device, recordings: Recordings, rung: Rung
) -> Plan:
    context = AudioContext(config.audio_context, config.audio_margin, shape.max_source_positions)
    precision = device.precision if config.precision == "auto" else config.precision
    if precision == "fp16" and device.kind != "cuda":  # as training does
        precision = "fp32"
    evaluates = config.eval_strategy != "no" and recordings.held_out > 0
    job = job_for(config, shape, rung, precision, recordings.longest_label)
    past = calibration.factors_for(device, job)
    eval_batch = config.per_device_eval_batch_size
    room = room_on(device) // (config.nproc if device.kind == "cpu" else 1)  # processes have GPUs of their own
    memory = predict(job)
    if evaluates:
        sizes = [eval_batch] if "per_device_eval_batch_size" in config.model_fields_set else [8, 4, 2, 1]
        for eval_batch in sizes:
            job = replace(job, per_device_eval_batch_size=eval_batch)
            memory = predict(job)
            if needed_bytes(memory, device) * past.memory <= room:
                break
    steps = step_count(config, recordings, rung.effective_batch * config.processes)
    return Plan(
        name,
        shape,
        config,
        device,
        recordings,
        rung,
        context,
        job,
        memory,
        int(needed_bytes(memory, device) * past.memory),
        room,
        duration_of(job, config, device, recordings, steps, eval_batch if evaluates else 0, context).scaled(past.time),
        steps,
        eval_steps(config, steps) if evaluates else 0,
        measured_clips(config, recordings) if evaluates else 0,
        past.trainings,
    )


def step_count(config: TrainConfig, recordings: Recordings, effective_batch: int) -> int:
    """As given; else 300 updates for few recordings, 500 to 800 for more, and PASSES through many, at most MOST_STEPS."""
    if "max_steps" in config.model_fields_set and config.max_steps:
        return config.max_steps
    if config.num_train_epochs is not None:
        return max(1, round(config.num_train_epochs * -(-recordings.clips // effective_batch)))
    few = 300 if recordings.clips < 50 else 500 if recordings.clips < 150 else 800
    steps = min(MOST_STEPS, max(few, PASSES * recordings.clips // effective_batch))
    given = config.model_fields_set
    # What was given has to find room in them.
    least = [2 * math.ceil(config.warmup_steps)] if "warmup_steps" in given and config.warmup_steps >= 1 else []
    return max(steps, *least, config.eval_steps if "eval_steps" in given else 1)


def eval_steps(config: TrainConfig, steps: int) -> int:
    """As given; else every 100 updates, less often where that would be more than MEASUREMENTS times."""
    if "eval_steps" in config.model_fields_set:
        return min(config.eval_steps, steps)
    if config.save_steps is not None:  # the best checkpoint has to be one that is saved
        return min(config.save_steps, steps)
    return min(steps, max(100, -(-steps // MEASUREMENTS)))


def measured_clips(config: TrainConfig, recordings: Recordings) -> int:
    if "max_eval_samples" in config.model_fields_set:
        return recordings.held_out  # cut already
    return min(recordings.held_out, MOST_MEASURED)


def duration_of(
    job: TrainingJob,
    config: TrainConfig,
    device: Device,
    recordings: Recordings,
    steps: int,
    eval_batch: int,
    context: AudioContext,
) -> Duration:
    """Steps at the mean length of the recordings, measurements, and what the process needs before the first step."""
    seconds = recordings.some_seconds
    # Batches hold clips of like length, so most are as long as their clips.
    positions = round(sum(context.positions(s) for s in seconds) / len(seconds))
    tokens = max(round(recordings.mean_label), 1)
    one = step_seconds(
        job.shape,
        device,
        finetuning=job.finetuning,
        quantized=job.quantization != "none",
        checkpointing=job.gradient_checkpointing,
        batch=job.per_device_train_batch_size,
        accumulation=job.gradient_accumulation_steps,
        positions=positions,
        tokens=tokens,
    )
    measured = 0.0
    if eval_batch:
        clips = measured_clips(config, recordings)
        once = evaluation_seconds(job.shape, device, clips=clips, batch=eval_batch, positions=positions, tokens=tokens)
        measured = (once / config.processes + SAVE_SECONDS) * max(1, round(steps / eval_steps(config, steps)))
    return Duration(steps * one, measured, START_SECONDS[device.kind])
