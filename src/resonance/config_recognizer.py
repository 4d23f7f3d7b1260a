"""Every setting of evaluation and transcription: names, types, bounds, defaults, help."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from resonance.config_checks import Problem, source_problems
from resonance.config_types import (
    SETTINGS,
    AnyPath,
    AudioContext,
    Count,
    Language,
    Model,
    OutputFormat,
    ReturnTimestamps,
    Share,
    Switch,
    Task,
    WindowSeconds,
    disagreement,
)
from resonance.messages import _

LEAST_INCREMENT = 0.05  # of the temperature, each time a text is decoded again


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
            raise disagreement(problems)
        return self


class TranscribeConfig(RecognizerConfig):
    """Turn recordings into text."""

    groups: ClassVar[dict[str, str]] = {
        "model_path": "Model",
        "audio_path": "Recordings",
        "output_file": "Result",
        "longform": "Long and difficult recordings",
        "phrases": "Phrases",
    }
    aliases: ClassVar[dict[str, str | Switch]] = {
        "per_device_eval_batch_size": "batch_size",
        "generation_num_beams": "num_beams",
        "vad_filter": "skip_nonspeech",
        "logprob_threshold": "log_prob_threshold",
        "output_formats": "output_format",
    }

    engine: Literal["auto", "torch", "ct2"] = "auto"
    """What computes: PyTorch (torch) or CTranslate2 (ct2), which needs the extra ct2 and a model exported for it. auto takes
    what is there and faster."""

    audio_path: AnyPath | None = None
    """Recording, folder of recordings, or pattern such as 'calls/*.mp3', to transcribe."""
    audio_list: AnyPath | None = None
    """File that lists recordings to transcribe, one path a line, or a JSON list."""

    output_file: AnyPath | None = None
    """File for the texts of all recordings. Left out, they are printed, or written to output_dir."""
    output_dir: AnyPath | None = None
    """Folder for one file for each recording and format, named as the recording."""
    output_format: list[OutputFormat] | None = Field(None, min_length=1)
    """Formats to write: txt, srt and vtt (subtitles), tsv, json, jsonl; several with commas. Left out, what output_file ends
    in, else json."""
    return_timestamps: ReturnTimestamps = False
    """Give the time of each sentence, in seconds, or of each word too (word)."""
    overwrite: bool = False
    """Transcribe again what output_file or output_dir has already. Otherwise a run that was stopped goes on."""
    max_line_length: int = Field(42, ge=8)
    """Characters in a line of subtitles; a Chinese, Japanese or Korean one counts as two."""
    max_line_count: Count = 2
    """Lines of one subtitle."""
    max_subtitle_seconds: float = Field(7.0, gt=0)
    """How long one subtitle stays at most."""
    script: Literal["simplified", "traditional", "taiwan", "hongkong"] | None = None
    """Write Chinese in this script. Left out, as the model writes it."""

    longform: Literal["auto", "windows", "sequential"] = "auto"
    """Recordings longer than the model hears at once: cut at pauses and decoded together (windows), or one stretch after the
    other as OpenAI does, which needs a model that writes times (sequential). auto takes windows for a model tuned by
    Resonance, else sequential where the model writes times."""
    max_window_seconds: WindowSeconds | None = None
    """Longest stretch of a long recording that is decoded at once. Left out, near the longest clip the model was trained
    on."""
    skip_nonspeech: bool = True
    """Write nothing for what is probably silence, noise or music."""
    no_speech_threshold: Share = 0.6
    """How probable the model must find silence before skip_nonspeech trusts it."""
    log_prob_threshold: float = -1.0
    """A text with a lower mean log-probability is decoded again at a higher temperature."""
    compression_ratio_threshold: float = Field(2.4, gt=0)
    """A text that repeats itself so much that gzip makes it this many times smaller is decoded again."""
    temperature_increment_on_fallback: float = Field(0.2, ge=0, le=1)
    """Temperature added each time a text is decoded again, up to 1. 0 decodes once."""
    condition_on_previous_text: bool = False
    """Tell the model what was said before, with longform sequential. Helps names to be spelt alike; loops once begun go on."""

    phrases: AnyPath | None = None
    """Text file with what this person says, one phrase a line: decoding leans towards it."""
    phrases_only: bool = False
    """Answer with one of the phrases, or with nothing where none is near enough."""
    phrases_weight: float = Field(1.0, ge=0)
    """How much decoding leans towards the phrases; 0 not at all."""
    phrases_threshold: Share = 0.5
    """With phrases_only: how probable the nearest phrase must be, else the answer is nothing."""

    @property
    def times(self) -> Literal["none", "segment", "word"]:
        """What `return_timestamps` asks for."""
        return "word" if self.return_timestamps == "word" else "segment" if self.return_timestamps else "none"

    @model_validator(mode="after")
    def _agree(self) -> TranscribeConfig:
        problems: list[Problem] = []
        if (self.audio_path is None) == (self.audio_list is None):
            text = _("Give either audio_path (a recording or a folder) or audio_list (a file that lists recordings).")
            problems.append((("audio_path", "audio_list"), text))
        if self.output_file and self.output_dir:
            text = _("Give either output_file (one file for all) or output_dir (a file for each recording).")
            problems.append((("output_file", "output_dir"), text))
        if self.phrases and self.longform == "sequential":
            text = _("phrases needs --longform windows: a phrase has no times to go on from.")
            problems.append((("phrases", "longform"), text))
        if 0 < self.temperature_increment_on_fallback < LEAST_INCREMENT:
            text = _(
                "temperature_increment_on_fallback must be 0, or at least {least}: every step decodes again."
            ).format(least=LEAST_INCREMENT)
            problems.append((("temperature_increment_on_fallback",), text))
        if self.phrases_only and not self.phrases:
            problems.append((("phrases_only", "phrases"), _("phrases_only needs phrases, the file that lists them.")))
        if self.phrases and self.engine == "ct2":
            text = _("phrases needs the engine torch: CTranslate2 cannot lean towards phrases.")
            problems.append((("phrases", "engine"), text))
        if problems:
            raise disagreement(problems)
        return self
