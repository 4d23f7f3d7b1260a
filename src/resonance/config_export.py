"""Every setting of export: names, types, bounds, defaults, help."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from resonance.config_checks import Problem
from resonance.config_types import SETTINGS, AnyPath, Language, Model, Share, Switch, disagreement
from resonance.messages import _

# The first of each is the default. int8 and q8_0 take a quarter of float32; what that costs is measured at each export.
QUANTIZATIONS: dict[str, tuple[str, ...]] = {
    "hf": ("float16", "bfloat16", "float32"),
    "ctranslate2": (
        *("int8", "int8_float16", "int8_float32", "int8_bfloat16"),
        *("int16", "float16", "bfloat16", "float32"),
    ),
    "ggml": ("q8_0", "f16"),
}
# Mean share of characters. See `ExportConfig.max_difference`.
ALLOWED_DIFFERENCE = {"8bit": 0.15, "16bit": 0.03}


class ExportConfig(BaseModel):
    """Write a model for other programs, and check that it still understands the same."""

    model_config = SETTINGS
    groups: ClassVar[dict[str, str]] = {"model_path": "Model", "to": "Result", "check_file": "Check"}
    aliases: ClassVar[dict[str, str | Switch]] = {"format": "to", "validation_file": "check_file"}

    model_path: Model
    """Model to export: the result of a training, its run folder, or a Whisper model."""
    base_model: Model | None = None
    """Where the model lies that the result was made from, if not where it was while training."""

    to: Literal["hf", "ctranslate2", "ggml"]
    """Programs to write for: those of Hugging Face (hf), faster-whisper and others on CTranslate2 (ctranslate2), whisper.cpp
    (ggml)."""
    output_dir: AnyPath | None = None
    """Folder for the exported model. Left out, one named as the format in the run folder."""
    quantization: str | None = None
    """Numbers the weights are written as. hf: float16, bfloat16, float32. ctranslate2: int8, int8_float16, int8_float32,
    int8_bfloat16, int16, float16, bfloat16, float32. ggml: q8_0, f16. Left out, the first of them."""
    overwrite: bool = False
    """Replace what output_dir holds, once the new export has passed its check."""

    check_file: AnyPath | None = None
    """Recordings that original and export transcribe: a list, a folder or one recording. Left out, those that the run held
    out, else those of the demo's speaker."""
    max_check_samples: int = Field(16, ge=1)
    """Compare on at most so many recordings."""
    language: Language | None = None
    """Language spoken in the recordings. Left out, the one the model was trained for, else found by the model."""
    max_difference: Share | None = None
    """Share of characters in which the texts of export and original may differ, on average over the recordings, before the
    export fails. Left out, 0.15 for weights in 8 bits, else 0.03."""

    @property
    def quantized(self) -> str:
        """`quantization`, or the format's usual one."""
        return self.quantization or QUANTIZATIONS[self.to][0]

    @property
    def allowed_difference(self) -> float:
        """`max_difference`, or the usual one for these weights."""
        if self.max_difference is not None:
            return self.max_difference
        return ALLOWED_DIFFERENCE["8bit" if self.quantized.startswith(("int8", "q8")) else "16bit"]

    @model_validator(mode="after")
    def _agree(self) -> ExportConfig:
        problems: list[Problem] = []
        if self.quantized not in QUANTIZATIONS[self.to]:
            text = _("quantization {given} does not go with {to}. Give one of {names}.")
            names = ", ".join(QUANTIZATIONS[self.to])
            problems.append((("quantization", "to"), text.format(given=self.quantization, to=self.to, names=names)))
        if problems:
            raise disagreement(problems)
        return self
