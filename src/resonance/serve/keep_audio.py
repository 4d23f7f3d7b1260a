"""Recordings kept with what was understood, where the operator wants that, and deleted when their days are over."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import threading
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np

from resonance.config_serve import ServeConfig
from resonance.data.audio import write_wav
from resonance.data.textfile import write_text_atomic
from resonance.errors import AudioError, ConfigError, DataError
from resonance.messages import _
from resonance.serve.patients import is_name
from resonance.serve.speech import Answer
from resonance.units import SAMPLE_RATE

BASE_FOLDER = "(base)"  # no patient's: their ids have no brackets
PURGE_SECONDS = 3600.0
KEPT_NAME = re.compile(r"\.?[0-9a-f]+\.(wav|json|part)|\.[0-9a-f]+\.json\.[0-9]+\.part")
log = logging.getLogger("resonance.serve")


class KeptAudio:
    """The folder: `2026-11-22/<patient>/<random>.wav`, and beside it a `.json` that is a row of a manifest, so that it can be
    corrected and trained on."""

    def __init__(self, folder: Path, days: float) -> None:
        """Raises ConfigError when the folder cannot be written."""
        self.folder, self._lasting = folder, timedelta(days=days)
        self._ending = threading.Event()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            probe = folder / f".{secrets.token_hex(6)}.part"
            probe.touch(mode=0o600)
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                [
                    _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                        path=folder, reason=error.strerror or error
                    )
                ]
            ) from None

    @classmethod
    def from_config(cls, config: ServeConfig) -> KeptAudio | None:
        """None where nothing is kept. Raises ConfigError where it is not said for how long."""
        if config.keep_audio is None:
            if config.keep_audio_days is not None:
                raise ConfigError([_("--keep_audio_days is given, but no folder: --keep_audio.")])
            return None
        if config.keep_audio_days is None:
            raise ConfigError([_("--keep_audio needs --keep_audio_days: after so many days recordings are deleted.")])
        return cls(config.keep_audio, config.keep_audio_days)

    def start(self) -> None:
        """Delete what is too old, now and every hour."""
        threading.Thread(target=self._purge_hourly, name="kept audio", daemon=True).start()

    def close(self) -> None:
        """No more is deleted after what is now: that may be on a disk that hangs, and is not waited for."""
        self._ending.set()

    def keep(self, samples: np.ndarray, answer: Answer, *, account: str, patient: str | None) -> Path | None:
        """Write a recording, float32 [samples] at 16 kHz, and its transcript: both or neither. The path of the WAV, or None
        when the disk refuses: that is logged, and the answer goes out all the same. Blocks; call it in a thread."""
        if patient is not None and not is_name(patient):
            raise ValueError
        now = datetime.now(UTC)
        folder = self.folder / now.date().isoformat() / (patient or BASE_FOLDER)
        name = secrets.token_hex(16)
        wav = folder / f"{name}.wav"
        result = answer.result
        row = {
            "audio": f"{name}.wav",
            "text": result.text,
            "duration": round(len(samples) / SAMPLE_RATE, 3),
            "language": result.language,
            "speaker": patient,
            "time": now.isoformat(timespec="seconds"),
            "account": account,
            "adapter": answer.voice and answer.voice.version,
            "fingerprint": answer.voice.fingerprint if answer.voice else answer.base_fingerprint,
        }
        try:
            for parent in (folder.parent, folder):
                parent.mkdir(exist_ok=True, mode=0o700)
            write_wav(wav, samples)
            write_text_atomic(
                folder / f"{name}.json", [json.dumps(row, ensure_ascii=False, indent=1), "\n"], mode=0o600
            )
        except (OSError, DataError, AudioError) as error:
            log.error("a recording could not be kept: %s", getattr(error, "strerror", None) or type(error).__name__)
            with contextlib.suppress(OSError):
                wav.unlink(missing_ok=True)
            return None
        return wav

    def purge(self) -> int:
        """Delete what is older than the days, and the folders that become empty. Only files that `keep` made are touched.
        Returns how many."""
        oldest = time.time() - self._lasting.total_seconds()
        deleted = 0
        for day in self.folder.iterdir():
            if not _is_day(day.name) or day.is_symlink():
                continue
            for person in [path for path in day.iterdir() if path.is_dir() and not path.is_symlink()]:
                for path in person.iterdir():
                    if KEPT_NAME.fullmatch(path.name) and path.lstat().st_mtime < oldest:
                        with contextlib.suppress(FileNotFoundError):
                            path.unlink()
                            deleted += 1
                _remove_if_empty(person)
            _remove_if_empty(day)
        return deleted

    def _purge_hourly(self) -> None:
        while True:
            try:
                self.purge()
            except OSError as error:
                log.error("old recordings could not be deleted: %s", error.strerror)
            if self._ending.wait(PURGE_SECONDS):
                return


def _is_day(name: str) -> bool:
    try:
        return date.fromisoformat(name).isoformat() == name
    except ValueError:
        return False


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not empty. `write_wav` makes again what it needs
        folder.rmdir()
