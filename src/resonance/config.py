"""Every setting of training, evaluation and transcription: names, types, bounds, defaults, help.

The help of a setting is the text under it. `config_io` makes flags, YAML files and error messages from this file; nothing
else repeats a name, a default or a bound. Settings with a default that depends on another one come after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from resonance import passthrough
from resonance.config_checks import Problem, source_problems, train_problems
from resonance.languages import language_code
from resonance.messages import _
from resonance.units import MAX_LABEL_TOKENS, WINDOW_SECONDS

DEFAULT_STEPS = 500
GOOD_EFFECTIVE_BATCH = range(8, 33)
ALIGNMENT_STEPS = 80
# The modules of a Whisper layer that a low-rank update can be put on, and PEFT's word for all linear ones.
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "conv1", "conv2", "embed_tokens", "proj_out")
ALL_LINEAR = "all-linear"

SETTINGS = ConfigDict(
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    allow_inf_nan=False,
    protected_namespaces=(),
    defer_build=True,  # a command needs one of the models
)


def _home(path: Path) -> Path:
    """`~` written out: shells leave it alone behind `=`, and a folder named ~ helps nobody."""
    return Path.home().joinpath(*path.parts[1:]) if path.parts[:1] == ("~",) else path


def _home_text(text: str) -> str:
    return str(_home(Path(text))) if text.startswith("~") else text


def _modules(names: list[str]) -> list[str]:
    if names == [ALL_LINEAR]:
        return names
    for name in names:
        if name.split(".")[-1] not in TARGET_MODULES:
            raise ValueError(
                _("Whisper has no modules named {name}. Give some of {names}, or {all} alone.").format(
                    name=repr(name), names=", ".join(TARGET_MODULES), all=ALL_LINEAR
                )
            )
    return names


def _hugging_face_choice(value: str, info: ValidationInfo) -> str:
    known = passthrough.choices(str(info.field_name))
    if value not in known:
        raise ValueError(_("It must be one of {choices}.").format(choices=", ".join(known)))
    return value


def _segment_times(value: Any) -> Any:
    """Whisper's users write `segment` for what is also `True`."""
    return True if value == "segment" else value


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Language = Annotated[str, AfterValidator(language_code)]
Task = Literal["transcribe", "translate"]
AnyPath = Annotated[Path, AfterValidator(_home)]
Model = Annotated[str, Field(min_length=1), AfterValidator(_home_text)]
WindowSeconds = Annotated[float, Field(gt=0, le=WINDOW_SECONDS)]
AudioContext = Literal["auto", "full"] | WindowSeconds
HuggingFaceChoice = Annotated[str, AfterValidator(_hugging_face_choice)]


@dataclass(frozen=True)
class Switch:
    """A true-or-false name that people type for one value of a setting.

    False means "not that value": it gives `otherwise`, unless the setting already has a third value.
    """

    setting: str
    value: str
    otherwise: str


def _disagreement(problems: list[Problem]) -> PydanticCustomError:
    text = "\n".join(message for _names, message in problems)
    return PydanticCustomError("disagreement", "{text}", {"text": text, "problems": problems})


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

    train_file: AnyPath | None = None
    """Recordings and transcripts to train on: a JSON, JSONL, CSV or TSV file or a data folder. Needed, unless
    dataset_dir and json_file are given."""
    validation_file: AnyPath | None = None
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

    finetuning: Literal["lora", "full", "frozen_encoder"] = "lora"
    """What is trained: a small addition to the model (lora, a few MB), the whole model (full) or its decoder
    (frozen_encoder)."""
    lora_r: int = Field(16, ge=1, le=512)
    """Rank, the width of the addition; 4 to 64 is usual."""
    lora_alpha: Count = 32
    """Strength of the addition; 2 to 4 times lora_r is usual."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Share of the addition's inputs that is dropped at random against overfitting; 0.05 to 0.1 is usual."""
    target_modules: Annotated[list[str], Field(min_length=1), AfterValidator(_modules)] = ["q_proj", "v_proj"]
    """Parts of each layer that get an addition, separated by commas; all-linear for all of them, which learns more and
    takes more memory."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Hold the unchanged part of the model in 8 or 4 bits, to save memory. Only with lora."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the computation. auto takes the 16-bit format that the GPU is good at, and fp32 on a CPU."""
    gradient_checkpointing: bool = False
    """Compute parts twice instead of keeping them: less memory, about a fifth slower."""

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
    resume: bool = False
    """Continue the run in output_dir where it stopped."""

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
        """Hugging Face writes -1 for "as many as num_train_epochs says"."""
        given = None if str(value) == "-1" else value
        return DEFAULT_STEPS if given is None and info.data.get("num_train_epochs") is None else given

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
            raise _disagreement(problems)
        return kept

    @model_validator(mode="after")
    def _agree(self) -> TrainConfig:
        problems = [*train_problems(self)]
        if problems:
            raise _disagreement(problems)
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


def _saves_as(strategy: str, data: Mapping[str, Any]) -> bool:
    """Whether checkpoints are written as `save_strategy` says, given the settings before it."""
    evaluation = data.get("eval_strategy", strategy)
    return strategy == ("steps" if data.get("save_steps") is not None or evaluation == "no" else evaluation)


def effective_batch(config: TrainConfig, devices: int) -> int:
    """Recordings behind one update of the model, over all `devices`."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * devices


def alignment_steps(config: TrainConfig) -> int:
    """Updates that fit the encoder to a short audio context; 0 where the context is the whole window or it is frozen."""
    if config.audio_context in ("full", WINDOW_SECONDS) or config.finetuning == "frozen_encoder":
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


class RecognizerConfig(BaseModel):
    """What `evaluate` and `transcribe` have in common: the model and how it decodes."""

    model_config = SETTINGS

    model_path: Model
    """Model to use: the result of a training, its run folder, or a Whisper model."""
    base_model: Model | None = None
    """Where the model lies that the result was made from, if not where it was while training."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Compute on the GPU (cuda) or the CPU. auto takes the GPU where one is."""
    language: Language | None = None
    """Language spoken in the recordings. Left out, the one the model was trained for, else found by the model."""
    task: Task | None = None
    """Text in the language that is spoken (transcribe) or in English (translate). Left out, what was trained."""
    batch_size: Count = 8
    """Recordings that are transcribed at once."""
    num_beams: int = Field(1, ge=1, le=64)
    """Alternatives followed at the same time; more is slower and sometimes better."""
    audio_context: AudioContext | None = None
    """How much audio the model looks at. Left out, what the model was trained with, else full."""


class EvaluateConfig(RecognizerConfig):
    """Measure how well a model recognises recordings, beside the model it was made from."""

    groups: ClassVar[dict[str, str]] = {"model_path": "Model", "test_file": "Data", "output_dir": "Result"}
    aliases: ClassVar[dict[str, str | Switch]] = {
        "validation_file": "test_file",
        "test_data": "test_file",
        "per_device_eval_batch_size": "batch_size",
        "generation_num_beams": "num_beams",
    }

    test_file: AnyPath | None = None
    """Recordings and transcripts to measure on, kept out of training. Left out, those that the run of model_path held
    out."""
    dataset_dir: AnyPath | None = None
    """Folder with the recordings, for paths that are not found beside the file that lists them."""
    json_file: str | None = Field(None, min_length=1)
    """Name of the file inside dataset_dir that lists recordings and transcripts, in place of test_file."""
    train_file: AnyPath | None = None
    """The training data, to tell phrases that were trained from new ones. Left out, the rows that the run trained on."""
    max_eval_samples: Count | None = None
    """Measure on at most so many recordings. Left out, on all."""

    output_dir: AnyPath | None = None
    """Folder for the report. Left out, the run folder, or `evaluation` where the model lies in none."""
    bootstrap_samples: int = Field(1000, ge=100, le=1_000_000)
    """Random draws behind each interval of 95 %."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Start of the random draws."""

    @model_validator(mode="after")
    def _agree(self) -> EvaluateConfig:
        problems: list[Problem] = []
        if self.test_file or self.json_file:  # left out, the rows that the run held out
            problems += source_problems("test_file", self.test_file, self.dataset_dir, self.json_file)
        if problems:
            raise _disagreement(problems)
        return self


class TranscribeConfig(RecognizerConfig):
    """Turn recordings into text."""

    groups: ClassVar[dict[str, str]] = {"model_path": "Model", "audio_path": "Recordings", "output_file": "Result"}
    aliases: ClassVar[dict[str, str | Switch]] = {
        "per_device_eval_batch_size": "batch_size",
        "generation_num_beams": "num_beams",
    }

    audio_path: AnyPath | None = None
    """Recording, or folder of recordings, to transcribe."""
    audio_list: AnyPath | None = None
    """File that lists recordings to transcribe, one path a line, or a JSON list."""

    output_file: AnyPath | None = None
    """File for the texts. Left out, they are printed."""
    return_timestamps: Annotated[bool, BeforeValidator(_segment_times)] = False
    """Give the time of each sentence, in seconds."""

    @model_validator(mode="after")
    def _agree(self) -> TranscribeConfig:
        if (self.audio_path is None) == (self.audio_list is None):
            text = _("Give either audio_path (a recording or a folder) or audio_list (a file that lists recordings).")
            raise _disagreement([(("audio_path", "audio_list"), text)])
        return self
