"""Every setting of `resonance plan` beside those of `resonance train`, which it takes too."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field, model_validator

from resonance.config import TrainConfig
from resonance.config_checks import Problem, train_problems
from resonance.config_types import AnyPath, MemorySize, Switch, WindowSeconds, disagreement
from resonance.messages import _


class PlanConfig(TrainConfig):
    """Choose settings that fit the recordings and the machine, and predict memory, time and cost.

    Takes every setting of `resonance train`: what you give is kept, what you leave out is chosen.
    """

    groups: ClassVar[dict[str, str]] = TrainConfig.groups | {"gpu": "Plan"}
    aliases: ClassVar[dict[str, str | Switch]] = TrainConfig.aliases | {"json": "print_json"}

    output_dir: AnyPath = Path("run")
    """Folder for the result of the training that is planned."""

    gpu: str | None = Field(None, min_length=1)
    """Plan for this card, such as "RTX 3090". Left out, for what this machine has."""
    gpu_memory: MemorySize | None = None
    """Plan for a card with so much memory, such as 8GB."""
    hours: float | None = Field(None, gt=0)
    """Plan for so many hours of speech that are not recorded yet, in place of train_file."""
    clip_seconds: WindowSeconds = 5.0
    """Length of a recording, for hours."""
    prices: AnyPath | None = None
    """YAML file with what machines cost an hour. Left out, the examples that come with Resonance."""
    print_json: bool = False
    """Print the plan as JSON, for programs."""
    write: AnyPath | None = None
    """Write the settings to this YAML file, which `resonance train --config` takes."""

    @property
    def steps_are_settled(self) -> bool:
        return "max_steps" in self.model_fields_set

    @property
    def streaming_is_settled(self) -> bool:
        return "streaming" in self.model_fields_set

    @model_validator(mode="after")
    def _agree(self) -> PlanConfig:
        problems: list[Problem] = list(train_problems(self, needs_source=self.hours is None))
        if self.hours is not None and (self.train_file or self.json_file):
            problems.append(
                (
                    ("hours", "train_file"),
                    _("hours is for a plan without recordings, but train_file names some. Keep one."),
                )
            )
        if self.hours is not None and self.clip_seconds > self.max_audio_len:
            text = _("clip_seconds {seconds:g} is more than max_audio_len {longest:g}: no recording would be left.")
            names = ("clip_seconds", "max_audio_len")
            problems.append((names, text.format(seconds=self.clip_seconds, longest=self.max_audio_len)))
        if problems:
            raise disagreement(problems)
        return self
