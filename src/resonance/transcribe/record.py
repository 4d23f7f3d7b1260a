"""With which model and settings the texts of an output were made, kept beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resonance.config_recognizer import TranscribeConfig
from resonance.data.textfile import write_text_atomic
from resonance.errors import DataError
from resonance.messages import _
from resonance.model import adapters
from resonance.model.builtin import folder_of
from resonance.transcribe.recognizer import Times

# Where texts go and what computes them: another choice gives the same texts.
NOT_IN_TEXTS = {
    *("audio_path", "audio_list", "output_file", "output_dir", "output_format", "overwrite"),
    *("device", "engine", "batch_size", "return_timestamps"),
}
LAYOUT = {"max_line_length", "max_line_count", "max_subtitle_seconds"}  # of subtitles, which are made from rows
TAIL = 1 << 20  # bytes at the end of a file of weights: training changes every layer, and 3 GB take seconds to read


@dataclass
class Record:
    """`settings` by name; how far the processes are with which list of recordings."""

    settings: dict[str, Any]
    recordings: str = ""  # digest of their names
    world: int = 0
    done: dict[str, int] = field(default_factory=dict)  # rank: how many recordings of its share failed
    finished: bool = False  # the output holds all of `recordings`

    def save(self, path: Path) -> None:
        write_text_atomic(path, [json.dumps(asdict(self), ensure_ascii=False, indent=1), "\n"])


def load(path: Path) -> Record | None:
    """None where there is none, or where it says nothing that this version understands."""
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def settings_of(config: TranscribeConfig, times: Times, *, layout: bool) -> dict[str, Any]:
    """What decides which texts come out, as JSON; with `layout`, how subtitles are laid out too.

    Files are told by their content: a folder may be trained into again.
    """
    left_out = NOT_IN_TEXTS if layout else NOT_IN_TEXTS | LAYOUT
    found = config.model_dump(mode="json", exclude=left_out) | {"return_timestamps": times}
    for name in ("model_path", "base_model"):
        if found[name]:
            found[name] = {"name": found[name], "content": _model_digest(found[name])}
    if config.phrases and config.phrases.is_file():
        found["phrases"] = {"name": str(config.phrases), "content": _digest([config.phrases.read_bytes()])}
    return found


def refuse_other_settings(record: Record, now: dict[str, Any], place: Path) -> None:
    """Raise DataError that names each setting which was another when the texts at `place` were made."""
    changed = []
    for name, value in now.items():
        default = TranscribeConfig.model_fields[name].default
        before = record.settings.get(name, default)  # of a version that did not have it
        if _identity(before) != _identity(value):
            changed.append(
                _("{name} was {before}, now {now}").format(name=name, before=_said(before), now=_said(value))
            )
    if changed:
        raise DataError(
            _(
                "{path} has texts that were made with other settings: {changes}. Add --overwrite to transcribe all again, or "
                "choose another place."
            ).format(path=place, changes="; ".join(changed))
        )


def digest_of_list(recordings: Sequence[Path], layout: str) -> str:
    return _digest([layout.encode(), *(str(path).encode("utf-8", "surrogateescape") for path in recordings)])


def _identity(value: Any) -> Any:
    return (value["content"] or value["name"]) if isinstance(value, dict) else value


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['name']} ({value['content'][:8]})" if value["content"] else str(value["name"])
    return "none" if value is None else str(value)


def _model_digest(name: str) -> str | None:
    """Of the files of a model or adapter folder; None for a name on a hub."""
    place = Path(folder_of(name)).expanduser()
    folder = adapters.find(place) or place
    if not folder.is_dir():
        return None
    parts = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith(".") and path.suffix in (".safetensors", ".bin", ".json"):
            with path.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(max(size - TAIL, 0))
                parts += [f"{path.name} {size}".encode(), stream.read()]
    return _digest(parts)


def _digest(parts: Sequence[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()
