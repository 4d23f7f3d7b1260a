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
    ReturnTimestamps,
    Switch,
    Task,
    disagreement,
)
from resonance.messages import _


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
    return_timestamps: ReturnTimestamps = False
    """Give the time of each sentence, in seconds."""

    @model_validator(mode="after")
    def _agree(self) -> TranscribeConfig:
        if (self.audio_path is None) == (self.audio_list is None):
            text = _("Give either audio_path (a recording or a folder) or audio_list (a file that lists recordings).")
            raise disagreement([(("audio_path", "audio_list"), text)])
        return self
