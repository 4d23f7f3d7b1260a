"""The folder that training leaves behind, and `resonance.json`, which says what it is.

A LoRA adapter folder holds PEFT's `adapter_config.json` and `adapter_model.safetensors`; a fully fine-tuned model holds
`config.json` and `model.safetensors`. Both hold the tokenizer, the feature extractor and `resonance.json`: everything
that transcribing on another machine needs besides the base model. Only safetensors and JSON are ever read.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from resonance.errors import AdapterError
from resonance.messages import _
from resonance.model.builtin import folder_of

INFO_FILE = "resonance.json"
FORMAT_VERSION: Literal[1] = 1
MAX_INFO_BYTES = 1 << 20


class Info(BaseModel):
    """Contents of `resonance.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    format_version: Literal[1] = FORMAT_VERSION
    kind: Literal["lora", "full"]
    base_model: str | None  # as given to --model_name_or_path; None: trained from nothing
    base_fingerprint: str | None  # of the base's weights, see `load.weights_fingerprint`
    language: str | None
    task: Literal["transcribe", "translate"]
    audio_context: Literal["auto", "full"] | float  # seconds when a number
    audio_margin: float  # seconds
    normalizer: str  # of the scores below
    scores: dict[str, Any]  # of the held-out rows, with counts
    data: dict[str, Any]  # rows, hours, fingerprint
    settings: dict[str, Any]  # the resolved configuration
    versions: dict[str, str]
    created: str = ""


def now() -> str:
    """The current time, UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_info(folder: Path) -> Info:
    """`resonance.json` of a folder. Raises AdapterError where it is missing or not what it should be."""
    path = folder / INFO_FILE
    try:
        if path.stat().st_size > MAX_INFO_BYTES:
            raise ValueError("too large")
        return Info.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(
            _("{folder} has no {name}: it was not written by Resonance, or only part of it was copied.").format(
                folder=folder, name=INFO_FILE
            )
        ) from None
    except ValueError as error:  # pydantic's and those of UTF-8 among them
        raise AdapterError(
            _("{path} is damaged or was written by another version of Resonance: {reason}").format(
                path=path, reason=str(error).splitlines()[0]
            )
        ) from None


def find(path: Path) -> Path | None:
    """The adapter or model folder that `path` names: itself, or the result of a run folder. None if it is neither."""
    for folder in (path, path / "adapter", path / "model"):
        if (folder / INFO_FILE).is_file() or (folder / "adapter_config.json").is_file():
            return folder
    return None


def own_info(name: str) -> Info | None:
    """`resonance.json` of the model `name`, which says at what audio context it was trained; None for stock models."""
    folder = find(Path(folder_of(name)).expanduser())
    return read_info(folder) if folder and (folder / INFO_FILE).is_file() else None


def check_complete(folder: Path) -> None:
    """Raise AdapterError naming the files that a LoRA adapter folder lacks."""
    needed = (
        "adapter_config.json",
        "adapter_model.safetensors",
        INFO_FILE,
        "tokenizer.json",
        "preprocessor_config.json",
    )
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise AdapterError(
            _("The adapter folder {folder} is incomplete; missing: {names}. Copy the whole folder again.").format(
                folder=folder, names=", ".join(missing)
            )
        )


def check_base(info: Info, folder: Path, base_name: str, base_fingerprint: str) -> None:
    """Raise AdapterError when an adapter would be put on weights that it was not trained with."""
    if info.base_fingerprint != base_fingerprint:
        raise AdapterError(
            _(
                "The adapter {folder} was trained on {expected} (weights {expected_print}), but {found} has other weights "
                "({found_print}). Give the right base with --base_model."
            ).format(
                folder=folder,
                expected=info.base_model,
                expected_print=(info.base_fingerprint or "")[:12],
                found=base_name,
                found_print=base_fingerprint[:12],
            )
        )
