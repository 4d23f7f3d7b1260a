"""The run folder: who may write to it, what state it is in, and where training goes on.

config.yaml  the resolved settings      checkpoints/  to resume from
events.jsonl every log row              adapter/ or model/  the result, written last
runs/        TensorBoard                report.html   by `resonance evaluate`
features/    with --feature_cache disk: what the model sees of the recordings; may be deleted
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from resonance.errors import RunFolderError
from resonance.messages import _
from resonance.model.adapters import INFO_FILE
from resonance.model.checkpoints import is_complete


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where everything lies in an output folder."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def train_rows(self) -> Path:
        return self.path / "data" / "train.json"

    @property
    def stream(self) -> Path:
        """What was streamed, in place of `train_rows`."""
        return self.path / "data" / "stream.json"

    @property
    def clips(self) -> Path:
        """Recordings out of a stream that are looked at again."""
        return self.path / "data" / "clips"

    @property
    def held_out_rows(self) -> Path:
        return self.path / "data" / "held_out.json"

    @property
    def features(self) -> Path:
        return self.path / "features"

    @property
    def result(self) -> Path | None:
        """The finished adapter or model folder, if there is one."""
        return next((f for f in (self.path / "adapter", self.path / "model") if (f / INFO_FILE).is_file()), None)

    def latest_checkpoint(self) -> Path | None:
        """The complete checkpoint with the most steps."""
        found = [
            (int(match[1]), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and is_complete(folder)
        ]
        return max(found)[1] if found else None


def containing(model_path: Path) -> RunFolder | None:
    """The run folder that `model_path` is, or whose result it is."""
    return next((RunFolder(p) for p in (model_path, model_path.parent) if RunFolder(p).events.is_file()), None)


def read_events(path: Path) -> list[dict[str, Any]]:
    """All rows of an `events.jsonl`; a last line torn by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@contextlib.contextmanager
def claim(path: Path, *, resume: bool, patience: float = 0) -> Iterator[RunFolder]:
    """Create or enter the run folder, which no other process can claim until the block ends. Waits `patience` seconds for
    one that has.

    Raises RunFolderError when it cannot be written, another process trains into it, it holds a run and `resume` is not
    set, or there is nothing to resume. Nothing in it is ever deleted.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise RunFolderError(
            _("{path} cannot be written: {reason}. Choose another --output_dir.").format(
                path=path, reason=error.strerror or error
            )
        ) from error
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise RunFolderError(
            _("Another training is writing to {path}. Wait for it, or choose another --output_dir.").format(path=path)
        ) from None
    try:
        run = RunFolder(path)
        problem = _conflict(run, resume)
        if problem:
            raise RunFolderError(problem)
        yield run
    finally:
        lock.release()


def _conflict(run: RunFolder, resume: bool) -> str:
    if run.result and not resume:
        return _(
            "{path} holds a finished training. Choose another --output_dir, or train on with --resume and more --max_steps."
        ).format(path=run.path)
    if (run.config.exists() or run.checkpoints.exists()) and not resume:
        latest = run.latest_checkpoint()
        return _(
            "{path} holds an unfinished training ({where}). Add --resume to continue it, or choose another --output_dir."
        ).format(path=run.path, where=latest.name if latest else _("no checkpoint yet"))
    return ""


def write_failure(error: Exception) -> str | None:
    """Why a file could not be written (a full disk, a limit), or None when `error` says something else.

    safetensors and torch.save have errors of their own for it.
    """
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error: " in text:
        return text.partition("I/O error: ")[2]
    if isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text):
        return _("the disk is full, or a file may not grow so large")
    return None
