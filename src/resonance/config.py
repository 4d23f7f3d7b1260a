"""Every setting of training: names, types, bounds, defaults, help. Those of the other commands: `config_recognizer`.

The help of a setting is the text under it. `config_io` makes flags, YAML files and error messages from this file; nothing
else repeats a name, a default or a bound. Settings with a default that depends on another one come after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from resonance import passthrough
from resonance.config_checks import Problem, train_problems
from resonance.config_types import (
    SETTINGS,
    AnyPath,
    AudioContext,
    Count,
    DataPlace,
    HuggingFaceChoice,
    Language,
    Model,
    Share,
    Switch,
    TargetModules,
    Task,
    WindowSeconds,
    disagreement,
)
from resonance.messages import _
from resonance.units import MAX_LABEL_TOKENS, WINDOW_SECONDS

DEFAULT_STEPS = 500
GOOD_EFFECTIVE_BATCH = range(8, 33)
ALIGNMENT_STEPS = 80
ZERO_STAGES: dict[str, Literal[1, 2, 3]] = {"zero1": 1, "zero2": 2, "zero3": 3}


def _default_eval_strategy(data: dict[str, Any]) -> Literal["steps", "no"]:
    return "steps" if data.get("validation_file") or data.get("validation_split") else "no"


def _default_warmup(data: Mapping[str, Any]) -> float:
    steps = data.get("max_steps")
    return min(50, steps // 10) if steps else 0.1


def _default_eval_steps(data: dict[str, Any]) -> int:
    return min(100, data.get("max_steps") or 100)


class TrainConfig(BaseModel):
    """Fine-tune Whisper on recordings and their transcripts.

    Every other setting of Hugging Face's Seq2SeqTrainingArguments (transformers 5) is taken too, under its own name.
    """

    model_config = SETTINGS
    # First setting of each group, and the group's title in the help.
    groups: ClassVar[dict[str, str]] = {
        "model_name_or_path": "Model",
        "train_file": "Data",
        "finetuning": "Method",
        "audio_context": "Audio context",
        "apply_spec_augment": "Augmentation",
        "output_dir": "Training",
        "nproc": "Several GPUs or machines",
        "use_wandb": "Logging",
    }
    aliases: ClassVar[dict[str, str | Switch]] = {
        "base_model": "model_name_or_path",
        "use_8bit": Switch("quantization", "8bit", otherwise="none"),
        "load_in_8bit": Switch("quantization", "8bit", otherwise="none"),
        "use_4bit": Switch("quantization", "4bit", otherwise="none"),
        "load_in_4bit": Switch("quantization", "4bit", otherwise="none"),
        "fp16": Switch("precision", "fp16", otherwise="fp32"),
        "bf16": Switch("precision", "bf16", otherwise="fp32"),
        "resume_from_checkpoint": Switch("resume", "true", otherwise="false"),
    }

    model_name_or_path: Model = "openai/whisper-small"
    """Whisper model to start from: a name on the Hugging Face hub or a folder."""
    cache_dir: AnyPath | None = None
    """Folder for downloaded models. Left out, Hugging Face's usual one."""
    language: Language | None = None
    """Language spoken in the recordings: Whisper's code or the English name, such as zh or Chinese."""
    task: Task = "transcribe"
    """Text in the language that is spoken (transcribe) or in English (translate)."""

    train_file: DataPlace | None = None
    """Recordings and transcripts to train on: a JSON, JSONL, CSV or TSV file or a data folder. Needed, unless
    dataset_dir and json_file are given. With streaming also tar shards, parquet files, a dataset of the Hugging Face hub,
    and addresses such as s3://bucket/folder."""
    validation_file: DataPlace | None = None
    """Recordings and transcripts kept out of training to measure it. Left out, validation_split takes a part of the
    training data."""
    dataset_dir: AnyPath | None = None
    """Folder with the recordings, for paths that are not found beside the file that lists them."""
    json_file: str | None = Field(None, min_length=1)
    """Name of the file inside dataset_dir that lists recordings and transcripts, in place of train_file."""
    validation_split: float = Field(0.1, ge=0, lt=1)
    """Share of the training data that is kept out of training to measure it; 0 keeps nothing out."""
    split_by: Literal["sentence", "speaker", "within_sentence"] = "sentence"
    """What never lies on both sides of the split. sentence measures new sentences, speaker new people; within_sentence
    measures new recordings of sentences that are trained."""
    max_train_samples: Count | None = None
    """Train on at most so many recordings. Left out, on all."""
    max_eval_samples: Count | None = None
    """Measure on at most so many recordings. Left out, on all."""
    max_audio_len: WindowSeconds = WINDOW_SECONDS
    """Longest recording that is used, in seconds. Whisper reads 30 seconds at once."""
    min_audio_len: float = Field(0.1, ge=0, lt=WINDOW_SECONDS)
    """Shortest recording that is used, in seconds."""
    dataloader_num_workers: int = Field(2, ge=0)
    """Processes that prepare audio while the model computes."""
    feature_cache_dir: AnyPath | None = None
    """Folder for feature_cache; several trainings can share it. Left out, features in output_dir."""
    feature_cache: Literal["none", "disk"] = Field(
        default_factory=lambda data: "disk" if data.get("feature_cache_dir") else "none"
    )
    """Decode every recording in every pass (none), or only in the first and keep what the model sees of it on disk, in 16
    bits (disk). Left out, disk where feature_cache_dir is given, else none."""

    streaming: bool = False
    """Read the training data while training instead of listing it first: for data of any size, tar shards (resonance data
    shard), parquet files and addresses. Needs max_steps."""
    shuffle_buffer: Count = 2000
    """Recordings that are held to be shuffled and put together by length, where streaming reads them one after the
    other."""
    skip_broken: bool = False
    """Leave out what is missing or damaged in streamed data, and say so, instead of stopping."""

    finetuning: Literal["lora", "full", "frozen_encoder"] = "lora"
    """What is trained: a small addition to the model (lora, a few MB), the whole model (full) or its decoder
    (frozen_encoder)."""
    lora_r: int = Field(16, ge=1, le=512)
    """Rank, the width of the addition; 4 to 64 is usual."""
    lora_alpha: Count = 32
    """Strength of the addition; 2 to 4 times lora_r is usual."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Share of the addition's inputs that is dropped at random against overfitting; 0.05 to 0.1 is usual."""
    target_modules: TargetModules = ["q_proj", "v_proj"]
    """Parts of each layer that get an addition, separated by commas; all-linear for all of them, which learns more and
    takes more memory."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Hold the unchanged part of the model in 8 or 4 bits, to save memory. Only with lora."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the computation. auto takes the 16-bit format that the GPU is good at, and fp32 on a CPU."""
    gradient_checkpointing: bool = False
    """Compute parts twice instead of keeping them: less memory, about a third slower."""

    audio_context: AudioContext = "auto"
    """How much audio the model looks at: as long as the recordings are (auto), always 30 seconds (full), or so many
    seconds."""
    audio_margin: float = Field(0.6, ge=0, le=WINDOW_SECONDS)
    """Silence kept behind the speech, in seconds. Recorded with the result, so that transcription keeps the same."""
    context_alignment_steps: int | None = Field(None, ge=0)
    """Updates before training that fit the short audio context to what the model hears in 30 seconds, without using the
    transcripts; 0 makes none. Left out, 80, or a third of max_steps if that is less."""

    apply_spec_augment: bool = False
    """Hide random stretches of time and pitch while training, against overfitting."""
    mask_time_prob: Share = 0.05
    """Share of the time that is hidden."""
    mask_time_length: Count = 10
    """Length of one hidden stretch of time, in frames of 10 ms."""
    mask_feature_prob: Share = 0.05
    """Share of the pitch bands that is hidden."""
    mask_feature_length: Count = 10
    """Width of one hidden stretch of pitch, in bands."""
    speed_perturbation: float = Field(0.0, ge=0, le=0.5)
    """Change the speed at random by up to this share: 0.1 is 90 to 110 %."""
    gain_db: float = Field(0.0, ge=0, le=40)
    """Change the loudness at random by up to so many decibels."""
    timestamp_fraction: Share = 0.3
    """Share of the recordings with known times that is trained with times, so that the model keeps writing them."""

    output_dir: AnyPath
    """Folder for the result, the checkpoints and the logs."""
    num_train_epochs: float | None = Field(None, gt=0)
    """How often to go through the training data."""
    max_steps: Count | None = Field(None, validate_default=True)
    """How many updates of the model to make. Wins over num_train_epochs. Left out with it, 500."""
    per_device_train_batch_size: Count = 8
    """Recordings that each GPU (or the CPU) trains on at once."""
    per_device_eval_batch_size: Count = 8
    """Recordings that each GPU (or the CPU) transcribes at once when measuring."""
    gradient_accumulation_steps: Count = 1
    """Batches that are summed up for one update of the model: a larger effective batch in the same memory."""
    learning_rate: float = Field(
        default_factory=lambda data: 1e-3 if data.get("finetuning", "lora") == "lora" else 1e-5, gt=0, le=1
    )
    """How far one update goes at its largest. Left out, 0.001 for lora and 0.00001 otherwise."""
    lr_scheduler_type: HuggingFaceChoice = "linear"
    """How the learning rate falls after the warm-up: linear, cosine, constant_with_warmup or another of transformers."""
    warmup_steps: float = Field(default_factory=_default_warmup, ge=0)
    """Updates during which the learning rate rises to its largest value; below 1, a share of all updates. Left out, 50,
    or a tenth of all updates if that is less or num_train_epochs counts."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Pull of the weights towards zero, against overfitting."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Longest gradient that is not shortened; 0 never shortens."""
    optim: HuggingFaceChoice = "adamw_torch_fused"
    """Optimiser, as named by transformers."""
    label_smoothing_factor: float = Field(0.0, ge=0, lt=1)
    """How much the labels are blurred; 0.1 is usual where it is used."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Start of all random choices: the same seed and data give the same run."""
    logging_steps: Count = 10
    """Updates between two rows of the log."""
    eval_strategy: Literal["steps", "epoch", "no"] = Field(default_factory=_default_eval_strategy)
    """Measure every eval_steps updates (steps), after each pass through the data (epoch) or never (no). Left out, steps
    where validation data is there."""
    eval_steps: Count = Field(default_factory=_default_eval_steps)
    """Updates between two measurements. Left out, 100, or max_steps if that is less."""
    save_steps: Count | None = None
    """Updates between two checkpoints. Left out, one with each measurement."""
    save_total_limit: Count | None = 3
    """Checkpoints that are kept; older ones are deleted, the best one never. none keeps all."""
    early_stopping_patience: Count | None = None
    """Stop after so many measurements without improvement. Left out, never."""
    metric_for_best_model: Literal["auto", "cer", "wer", "mer"] = "auto"
    """Error rate that decides which checkpoint is best: by character (cer), word (wer) or mixed (mer). auto decides by
    the language."""
    load_best_model_at_end: bool = Field(default_factory=lambda data: data.get("eval_strategy") != "no")
    """Keep the best checkpoint as the result instead of the last. Left out, true wherever something is measured."""
    generation_max_length: int = Field(MAX_LABEL_TOKENS, ge=1, le=MAX_LABEL_TOKENS)
    """Longest text the model writes when measured, in tokens."""
    generation_num_beams: int = Field(1, ge=1, le=64)
    """Alternatives followed at the same time when measuring; more is slower and sometimes better."""
    auto: bool = False
    """Choose the settings that are left out: those that fit the recordings and this machine, as resonance plan says."""
    resume: bool = False
    """Continue the run in output_dir where it stopped."""

    nproc: Count = 1
    """Processes on this machine that train together, one for each GPU. The effective batch is as many times larger."""
    nnodes: Count = 1
    """Machines that train together. Start the same command on each, with its own node_rank."""
    node_rank: int = Field(0, ge=0)
    """Number of this machine among them, from 0."""
    rdzv: str | None = Field(None, min_length=1)
    """Where the machines meet: address and port of the one with node_rank 0, such as 10.0.0.1:29400."""
    max_restarts: int = Field(3, ge=0)
    """How often a training of several processes is started again, from its last checkpoint, when one of them dies."""

    deepspeed: str | None = Field(None, min_length=1)
    """Divide the training's memory among the processes with DeepSpeed: optimiser states (zero1), gradients too (zero2),
    weights too (zero3), or as a JSON file of your own says. Needs the deepspeed package."""
    fsdp: bool = False
    """Divide weights, gradients and optimiser states among the processes with PyTorch's FSDP."""

    use_wandb: bool = False
    """Send the log to Weights & Biases too. Needs an account there and the wandb package."""
    wandb_project: str | None = Field(None, min_length=1)
    """Project at Weights & Biases."""
    run_name: str | None = Field(None, min_length=1)
    """Name of this run in the logs."""

    extra: dict[str, Any] = Field({})
    """Further Seq2SeqTrainingArguments, passed on as they are."""

    @field_validator("max_steps", mode="before")
    @classmethod
    def _steps(cls, value: Any, info: ValidationInfo) -> Any:
        """Hugging Face writes -1 for "as many as num_train_epochs says". A stream has no end to count from."""
        given = None if str(value) == "-1" else value
        open_ended = info.data.get("num_train_epochs") is None and not info.data.get("streaming")
        return DEFAULT_STEPS if given is None and open_ended else given

    @field_validator("extra")
    @classmethod
    def _extra(cls, values: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """Each value as transformers takes it, without what Resonance sets itself to the same value."""
        problems: list[Problem] = []
        kept = {}
        for name, value in values.items():
            try:
                if name in cls.model_fields or name in cls.aliases:
                    raise ValueError(_("It is a setting of its own and has no place in extra."))
                converted = passthrough.typed(name, value)
                if name == "save_strategy" and not _saves_as(converted, info.data):
                    raise ValueError(passthrough.owned()[name][1])
            except ValueError as error:
                problems.append(((name,), str(error)))
                continue
            if name not in passthrough.owned():
                kept[name] = converted
        if problems:
            raise disagreement(problems)
        return kept

    @property
    def steps_are_settled(self) -> bool:
        """False where a plan is still to choose how many updates are made."""
        return not self.auto or "max_steps" in self.model_fields_set

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.nproc * self.nnodes

    @property
    def in_processes(self) -> bool:
        """Whether the training is started by a launcher."""
        return self.processes > 1 or self.deepspeed is not None or self.fsdp

    @property
    def streaming_is_settled(self) -> bool:
        """False where a plan is still to choose whether the data is streamed."""
        return not self.auto or "streaming" in self.model_fields_set

    @property
    def whole_window(self) -> bool:
        """Whether the model looks at 30 s of every recording, however short."""
        return self.audio_context in ("full", WINDOW_SECONDS)

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
        problems = [*train_problems(self)]
        if problems:
            raise disagreement(problems)
        return self


class CurveConfig(TrainConfig):
    """Train on more and more of the recordings and measure each time, to see whether more recordings help.

    Takes every setting of `resonance train`.
    """

    groups: ClassVar[dict[str, str]] = TrainConfig.groups | {"sizes": "Curve"}
    aliases: ClassVar[dict[str, str | Switch]] = TrainConfig.aliases | {"test_file": "validation_file"}

    sizes: Annotated[list[Count], Field(min_length=1)] = [10, 30, 50, 100]
    """Numbers of recordings to train on, separated by commas. In place of more than there are, all are taken."""
    validation_split: float = Field(0.25, ge=0, lt=1)
    """Share of the recordings that every training is measured on, where no validation_file is given."""

    @field_validator("streaming")
    @classmethod
    def _listed(cls, value: bool) -> bool:
        if value:
            raise ValueError(_("A curve trains on parts of a list, which cannot be streamed."))
        return value


def _saves_as(strategy: str, data: Mapping[str, Any]) -> bool:
    """Whether checkpoints are written as `save_strategy` says, given the settings before it."""
    evaluation = data.get("eval_strategy", strategy)
    return strategy == ("steps" if data.get("save_steps") is not None or evaluation == "no" else evaluation)


def effective_batch(config: TrainConfig, devices: int) -> int:
    """Recordings behind one update of the model, over all `devices`."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * devices


def alignment_steps(config: TrainConfig) -> int:
    """Updates that fit the encoder to a short audio context; 0 where the context is the whole window or it is frozen."""
    if config.whole_window or config.finetuning == "frozen_encoder":
        return 0
    if config.context_alignment_steps is not None:
        return config.context_alignment_steps
    return min(ALIGNMENT_STEPS, config.max_steps // 3) if config.max_steps else ALIGNMENT_STEPS


def batch_warning(config: TrainConfig, devices: int) -> str | None:
    """What to say where the effective batch is outside the range that works well, else None."""
    batch = effective_batch(config, devices)
    if batch in GOOD_EFFECTIVE_BATCH:
        return None
    low, high = GOOD_EFFECTIVE_BATCH[0], GOOD_EFFECTIVE_BATCH[-1]
    if batch < low:
        advice = _("Training may be unsteady: raise gradient_accumulation_steps.")
    else:
        advice = _(
            "Few recordings may be learned too slowly: lower gradient_accumulation_steps or per_device_train_batch_size."
        )
    return _("The effective batch is {batch}; {low} to {high} works well. {advice}").format(
        batch=batch, low=low, high=high, advice=advice
    )
