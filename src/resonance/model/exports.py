"""Exported models: `export.json`, which says what a folder was made from, and the exports that lie in a run folder.

`resonance.json` goes with the weights in any format. What belongs to one export alone (its format, how far its texts are from
those of the original, how fast it was) stands beside it, so that a stock model's export has it too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from resonance.errors import ModelError
from resonance.messages import _
from resonance.model import adapters, runs
from resonance.model.builtin import folder_of

RECORD_FILE = "export.json"
Format = Literal["hf", "ctranslate2", "ggml"]
CTRANSLATE2_FILES = ("config.json", "model.bin", "tokenizer.json", "preprocessor_config.json")
VOCABULARIES = ("vocabulary.json", "vocabulary.txt")  # of CTranslate2 3 and newer; of older ones


class Record(BaseModel):
    """Contents of `export.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format_version: Literal[1] = 1
    format: Format
    quantization: str
    source: str  # the folder or hub name that was exported
    source_fingerprint: str  # see `source_fingerprint`
    base_model: str | None  # of an adapter
    writes_timestamps: bool  # whether the model, asked for times, gives them
    clips: int  # that were transcribed with both
    difference: float  # mean share of characters that differ
    max_difference: float  # that was allowed
    difference_in_faster_whisper: float | None  # the same there, as people call it; None: not compared
    audio_seconds: float  # of all clips
    seconds: dict[str, float]  # engine to the time it took for all clips, on the CPU in batches
    versions: dict[str, str]
    created: str = ""


def read_record(folder: Path) -> Record | None:
    """`export.json` of a folder, None where there is none. Raises ModelError where it is not what it should be."""
    path = folder / RECORD_FILE
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        raise ModelError(
            _("{path} is damaged or was written by another version of Resonance: {reason}").format(
                path=path, reason=str(error).splitlines()[0]
            )
        ) from None


def source_fingerprint(model_path: str) -> str:
    """What tells the weights of `model_path` from those before another training.

    SHA-256 of an adapter's weights; of a whole model, `load.weights_fingerprint`.
    """
    folder = adapters.find(Path(folder_of(model_path)).expanduser())
    if folder and (folder / "adapter_model.safetensors").is_file():
        return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    from resonance.model.load import weights_fingerprint

    return weights_fingerprint(str(folder or folder_of(model_path)))


def is_ctranslate2(folder: Path) -> bool:
    """Whether `folder` holds a model for CTranslate2, whole or not."""
    return (folder / "model.bin").is_file() or any((folder / name).is_file() for name in VOCABULARIES)


def check_ctranslate2(folder: Path) -> None:
    """Raise ModelError naming the files that a model for CTranslate2 lacks."""
    missing = [name for name in CTRANSLATE2_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in VOCABULARIES):
        missing.append(VOCABULARIES[0])
    if missing:
        raise ModelError(
            _("The model folder {folder} is incomplete; missing: {names}. Copy it or export it again.").format(
                folder=folder, names=", ".join(missing)
            )
        )


def default_folder(model_path: str, to: Format) -> Path | None:
    """Where an export of `model_path` lies if nobody says otherwise: in the run folder that it is, or is the result of."""
    folder = Path(folder_of(model_path)).expanduser().resolve()
    run = runs.containing(folder)
    return run.path / to if run and folder in (run.path, run.result) else None
