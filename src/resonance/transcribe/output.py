"""`resonance transcribe`: progress on stderr, texts on stdout or in a file, failures in the exit code."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from resonance.config_recognizer import TranscribeConfig
from resonance.data.textfile import write_text_atomic
from resonance.errors import DataError
from resonance.messages import _
from resonance.progress_bar import progress_bar
from resonance.transcribe.files import FileResult, Span, list_audio, transcribe_files
from resonance.transcribe.recognizer import DecodeSettings
from resonance.transcribe.torch_engine import load_recognizer


def transcribe_to_output(config: TranscribeConfig) -> int:
    """Transcribe what `config` names. Returns the exit code: 1 when a file could not be transcribed."""
    paths = list_audio(config.audio_path, config.audio_list)
    if config.output_file:
        check_writable(config.output_file)
    recognizer = load_recognizer(
        config.model_path, base_model=config.base_model, device=config.device, audio_context=config.audio_context
    )
    settings = DecodeSettings(config.language, config.task, config.num_beams, config.return_timestamps)
    console = Console(stderr=True)
    spans = [Span(path) for path in paths]
    with progress_bar(console, _("transcribing"), len(spans)) as advance:
        results = list(transcribe_files(recognizer, spans, settings, batch_size=config.batch_size, done=advance))
    failed = [result for result in results if result.error is not None]
    if config.return_timestamps and any(result.coarse for result in results):
        print(
            _(
                "This model was not trained to give times: each text has those of its whole recording, or of the part cut out."
            ),
            file=sys.stderr,
        )
    if config.output_file:
        rows = [result.as_row(config.return_timestamps) for result in results]
        try:
            write_text_atomic(config.output_file, [json.dumps(rows, ensure_ascii=False, indent=1), "\n"])
        except DataError:
            print_texts(results, config.return_timestamps)  # hours of work are not lost to a full disk
            raise
        print(_("{count} texts written to {path}").format(count=len(rows) - len(failed), path=config.output_file))
    else:
        print_texts(results, config.return_timestamps)
    for result in failed:
        print(_("Error: {message}").format(message=result.error), file=sys.stderr)
    return 1 if failed else 0


def check_writable(path: Path) -> None:
    """Raise DataError now, not after hours of work, when `path` cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise DataError(
            _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                path=path, reason=error.strerror or error
            )
        ) from error


def print_texts(results: Sequence[FileResult], timestamps: bool) -> None:
    """One text alone; several with their file before a tab; with times, one segment a line."""
    for result in results:
        if result.error is not None:
            continue
        prefix = f"{result.audio_path}\t" if len(results) > 1 else ""
        if timestamps:
            for s in result.segments:
                print(f"{prefix}[{s.start:.2f} - {s.end:.2f}] {s.text}")
        else:
            print(prefix + result.text)
