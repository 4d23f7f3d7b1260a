"""`resonance data convert`: a folder of recordings in any format to 16 kHz mono WAV, the same folders and names inside.

An output appears only when it is complete, so a second run does what the first one left.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resonance.data.audio import iter_blocks, write_wav
from resonance.data.textfile import read_text, write_text_atomic
from resonance.errors import AudioError, DataError, ManifestError
from resonance.messages import _

MEDIA_SUFFIX = re.compile(
    r"\.(3g2|3gp|aac|ac3|aif|aifc|aiff|amr|ape|asf|au|avi|caf|dss|eac3|flac|flv|gsm|m2ts|m4a|m4b|m4v|mka|mkv|mov|mp2|mp3"
    r"|mp4|mpeg|mpg|mts|nist|oga|ogg|ogv|opus|ra|rm|snd|sph|spx|ts|tta|voc|vob|w64|wav|wave|weba|webm|wma|wmv|wv)",
    re.IGNORECASE,
)
# Starting a worker process takes about as long as converting this much compressed sound.
BYTES_WORTH_A_WORKER = 4_000_000


@dataclass(frozen=True, slots=True)
class ConvertSummary:
    """What a conversion did."""

    converted: int
    skipped: int  # already there from an earlier run
    ignored: int  # neither audio nor video nor labels.json
    failed: tuple[tuple[Path, str], ...]  # file, reason (a whole sentence that names the file)


def convert_folder(
    source: Path, target: Path, *, workers: int | None = None, overwrite: bool = False
) -> ConvertSummary:
    """Convert the recordings in the folder `source` (or the one file) to 16 kHz mono WAV files in the folder `target`.

    For one file, `target` may also be the name of the output, ending in `.wav`. `a/x.m4a` becomes `a/x.wav`. Recordings that differ only in their ending keep it: `x.mp3` and `x.m4a` become `x.mp3.wav`
    and `x.m4a.wav`. Each `labels.json` is written to the same place in `target` with the new paths. Hidden files are left out.
    Outputs newer than their recording are skipped unless `overwrite`. Recordings that cannot be read are listed in the
    summary; the others go on. Raises DataError when nothing can be done: no recordings, an output that would replace a
    recording, no permission, a full disk. `source` is never changed.
    """
    if not source.exists():
        raise DataError(_("{path}: no such file or folder. Check the name.").format(path=source))
    if source.is_file():
        found = media = [source]
        to_file = target.suffix.lower() == ".wav" and not target.is_dir()
        outputs = {source: target if to_file else target / f"{source.stem}.wav"}
    else:
        found = sorted(_files(source, target))
        media = [path for path in found if MEDIA_SUFFIX.fullmatch(path.suffix)]
        outputs = {path: target / name for path, name in _output_names(source, media).items()}
    if not media:
        raise DataError(_("{path}: no audio or video files in this folder.").format(path=source))
    _refuse_overwriting(outputs)

    todo = {path: out for path, out in outputs.items() if overwrite or not _is_current(path, out)}
    failed = _convert_all(todo, workers)
    converted = len(todo) - len(failed)
    labels = [path for path in found if path.name == "labels.json" and path != source]
    for path in labels:
        if reason := _copy_labels(path, target / path.relative_to(source), outputs, overwrite):
            failed.append((path, reason))
    ignored = len(found) - len(media) - len(labels)
    return ConvertSummary(converted, len(outputs) - len(todo), ignored, tuple(failed))


def format_summary(summary: ConvertSummary) -> str:
    """The summary as lines for the screen: the files that failed, then the counts."""
    lines = [reason for _path, reason in summary.failed]
    if lines:
        lines.insert(0, _("Not converted:"))
    lines.append(
        _(
            "Converted: {converted}. Already there: {skipped}. Failed: {failed}. Other files left alone: {ignored}."
        ).format(
            converted=summary.converted, skipped=summary.skipped, failed=len(summary.failed), ignored=summary.ignored
        )
    )
    return "\n".join(lines)


def _files(source: Path, target: Path) -> Iterator[Path]:
    """All files below `source` that are not hidden, without those in `target`."""
    if source.resolve() == target.resolve():
        raise DataError(
            _("{path}: the recordings are in this folder already. Choose another output folder.").format(path=target)
        )

    def refuse(error: OSError) -> None:
        raise DataError(
            _("{path}: cannot be read ({reason}).").format(path=error.filename, reason=error.strerror)
        ) from error

    for folder, folders, names in os.walk(source, onerror=refuse):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (Path(folder) / name).resolve() != target.resolve()
        ]
        yield from (Path(folder) / name for name in names if not name.startswith("."))


def _output_names(folder: Path, media: list[Path]) -> dict[Path, Path]:
    """Recording to output, relative to the target folder; no two the same, also where upper and lower case are one."""

    def key(name: Path) -> str:
        return str(name).casefold()

    names = {path: path.relative_to(folder).with_suffix(".wav") for path in media}
    while True:
        uses = Counter(map(key, names.values()))
        longer = {path: path.relative_to(folder).with_name(f"{path.name}.wav") for path in media}
        shared = [path for path, name in names.items() if uses[key(name)] > 1 and name != longer[path]]
        if not shared:
            return names
        names.update((path, longer[path]) for path in shared)


def _refuse_overwriting(outputs: dict[Path, Path]) -> None:
    originals = {path.resolve() for path in outputs}
    for path, out in outputs.items():
        if out.resolve() in originals:
            raise DataError(
                _("{path}: would be replaced by the converted {source}. Choose another output folder.").format(
                    path=out, source=path.name
                )
            )


def _is_current(path: Path, out: Path) -> bool:
    try:
        return out.stat().st_mtime >= path.stat().st_mtime
    except OSError:
        return False


def _convert_all(todo: dict[Path, Path], workers: int | None) -> list[tuple[Path, str]]:
    """Convert; the recordings that failed, with the reason, in the order of `todo`."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        size = sum(path.stat().st_size for path in todo if path.exists())
        workers = min(cores, len(todo), 1 + size // BYTES_WORTH_A_WORKER)
    from rich.console import Console  # not in every worker process

    from resonance.progress_bar import progress_bar

    with progress_bar(Console(stderr=True), _("Converting"), len(todo)) as advance:
        if workers <= 1:
            reasons = {}
            for path, out in todo.items():
                reasons[path] = _convert_one(path, out)
                advance(1)
        else:
            reasons = _convert_in_processes(todo, workers, advance)
    return [(path, reason) for path in todo if (reason := reasons[path])]


def _convert_in_processes(
    todo: dict[Path, Path], workers: int, advance: Callable[[int], None]
) -> dict[Path, str | None]:
    reasons: dict[Path, str | None] = {}
    # spawn: a forked child inherits locks of the threads that libraries have started.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        running = {executor.submit(_convert_one, path, out): path for path, out in todo.items()}
        for future in concurrent.futures.as_completed(running):
            reasons[running[future]] = future.result()
            advance(1)
    except BrokenProcessPool:
        stopped = _(
            "{path}: not done, because a process stopped unexpectedly (too little memory?). Run the command again."
        )
        return {path: reasons.get(path, stopped.format(path=path)) for path in todo}
    finally:
        # On an error or Ctrl-C: the files in work are finished or leave nothing, the others are not begun.
        executor.shutdown(cancel_futures=True)
    return reasons


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the main one decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A pool's processes wait for work for ever when the main one is killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _convert_one(path: Path, out: Path) -> str | None:
    """Convert one recording: None, or why it cannot be read. Raises DataError when `out` cannot be written."""
    try:
        write_wav(out, iter_blocks(path))
    except AudioError as error:
        return str(error)
    return None


def _copy_labels(path: Path, out: Path, outputs: dict[Path, Path], overwrite: bool) -> str | None:
    """Write the JSON file `path` to `out`, each name of a converted recording replaced; why not, if it cannot be done."""
    folder = os.path.abspath(path.parent)  # noqa: PTH100 - Path.resolve asks the disk, for every word of the file
    converted = {
        os.path.abspath(original): Path(os.path.relpath(output, out.parent)).as_posix()  # noqa: PTH100
        for original, output in outputs.items()
    }

    def adjusted(value: Any) -> Any:
        if isinstance(value, str):
            return converted.get(os.path.normpath(os.path.join(folder, value)), value)  # noqa: PTH118
        if isinstance(value, list):
            return [adjusted(item) for item in value]
        if isinstance(value, dict):
            return {adjusted(name): adjusted(item) for name, item in value.items()}
        return value

    try:
        text = json.dumps(adjusted(json.loads(read_text(path))), ensure_ascii=False, indent=2) + "\n"
    except ManifestError as error:
        return str(error)
    except json.JSONDecodeError as error:
        return _("{path}: line {line}, column {column}: not valid JSON ({reason}). Correct it and run again.").format(
            path=path, line=error.lineno, column=error.colno, reason=error.msg
        )
    if out.exists() and not overwrite:
        if out.read_bytes() == text.encode():
            return None
        return _(
            "{path}: is already there with other content and was left as it is. Move it away and run again."
        ).format(path=out)
    write_text_atomic(out, [text])
    return None
