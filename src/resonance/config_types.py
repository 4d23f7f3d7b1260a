"""Types that settings share: their bounds, and how what people type becomes a value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationInfo
from pydantic_core import PydanticCustomError

from resonance import passthrough
from resonance.config_checks import Problem
from resonance.languages import language_code
from resonance.messages import _
from resonance.units import GIBIBYTE, MEBIBYTE, WINDOW_SECONDS

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


def _address(text: str) -> str:
    if "://" not in text:
        raise ValueError(_("It must be an address such as s3://bucket/folder."))
    return text


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


def memory_bytes(text: str) -> int:
    """Bytes of `8GB`, `7.5 GiB` or `8192MiB`. Makers of cards and nvidia-smi both mean powers of 1024. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(g|m)i?b?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * (GIBIBYTE if found[2].lower() == "g" else MEBIBYTE)) if found else 0
    if size <= 0:
        raise ValueError(_("It must be a size such as 8GB or 7500MiB."))
    return size


def _memory_size(text: str) -> str:
    memory_bytes(text)
    return text


Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Language = Annotated[str, AfterValidator(language_code)]
Task = Literal["transcribe", "translate"]
AnyPath = Annotated[Path, AfterValidator(_home)]
ADDRESS = "address"  # marks text that is one, for the help
DataPlace = AnyPath | Annotated[str, Field(min_length=1), AfterValidator(_address), ADDRESS]
Model = Annotated[str, Field(min_length=1), AfterValidator(_home_text)]
WindowSeconds = Annotated[float, Field(gt=0, le=WINDOW_SECONDS)]
AudioContext = Literal["auto", "full"] | WindowSeconds
HuggingFaceChoice = Annotated[str, AfterValidator(_hugging_face_choice)]
MemorySize = Annotated[str, AfterValidator(_memory_size)]
TargetModules = Annotated[list[str], Field(min_length=1), AfterValidator(_modules)]
ReturnTimestamps = Annotated[bool | Literal["word"], BeforeValidator(_segment_times)]
OutputFormat = Literal["txt", "srt", "vtt", "tsv", "json", "jsonl"]


@dataclass(frozen=True)
class Switch:
    """A true-or-false name that people type for one value of a setting.

    False means "not that value": it gives `otherwise`, unless the setting already has a third value.
    """

    setting: str
    value: str
    otherwise: str


def disagreement(problems: list[Problem]) -> PydanticCustomError:
    text = "\n".join(message for _names, message in problems)
    return PydanticCustomError("disagreement", "{text}", {"text": text, "problems": problems})
