"""Where texts are written: the formats, and a file name for each recording that no other has."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from resonance.config_recognizer import TranscribeConfig
from resonance.config_types import OutputFormat
from resonance.errors import ConfigError
from resonance.messages import _
from resonance.transcribe.formats import SUBTITLES, TIMED
from resonance.transcribe.recognizer import Times

FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)


def chosen_formats(config: TranscribeConfig) -> list[OutputFormat]:
    """What to write; empty for plain texts on stdout. Raises ConfigError where output_file does not say."""
    if config.output_format:
        return list(dict.fromkeys(config.output_format))
    if config.output_file is None:
        return ["json"] if config.output_dir else []
    suffix = config.output_file.suffix.lower().removeprefix(".")
    if suffix and suffix not in FORMATS:
        raise ConfigError(
            [
                _(
                    "--output_file {path}: .{suffix} is no format of ours. End the name in one of {choices}, or give "
                    "--output_format."
                ).format(path=config.output_file, suffix=suffix, choices=", ".join(FORMATS))
            ]
        )
    return [form for form in FORMATS if form == (suffix or "json")]


def asked_times(config: TranscribeConfig, formats: Sequence[OutputFormat]) -> Times:
    """What `return_timestamps` asks for; segments too where a format cannot be without."""
    return "segment" if config.times == "none" and set(formats) & set(TIMED) else config.times


def refuse_many_in_one(config: TranscribeConfig, formats: Sequence[OutputFormat], recordings: int, world: int) -> None:
    """Raise ConfigError for what cannot go into one file, or onto the screen."""
    problems = []
    if not config.output_dir and recordings > 1 and (which := set(formats) & set(SUBTITLES)):
        text = _(
            "Subtitles ({formats}) of {count} recordings do not fit into one file. Give --output_dir, a folder for one file each."
        )
        problems.append(text.format(formats=", ".join(sorted(which)), count=recordings))
    if not config.output_dir and not config.output_file:
        if len(formats) > 1:
            problems.append(_("Several formats need files: give --output_file or --output_dir."))
        if world > 1:
            problems.append(_("Several processes need a place for their texts: give --output_file or --output_dir."))
    if problems:
        raise ConfigError(problems)


def shared_files(output_file: Path, formats: Sequence[OutputFormat]) -> dict[OutputFormat, Path]:
    """The file of each format: `output_file` itself for one; for several the same stem."""
    if len(formats) == 1:
        return {formats[0]: output_file}
    known = output_file.suffix.lower().removeprefix(".") in FORMATS
    stem = output_file.stem if known else output_file.name
    return {form: output_file.with_name(f"{stem}.{form}") for form in formats}


def names(recordings: Sequence[Path]) -> dict[Path, str]:
    """For each recording the place of its text, without a suffix, relative to the output folder.

    Its own name without suffix, where that is enough. Where recordings of several folders share a name, all keep their
    folders below the common one; where only the suffix tells two apart, they keep theirs: `x.wav.srt`, `x.mp3.srt`. No two
    are the same, also on disks that do not tell upper from lower case.
    """
    places = {path: os.path.abspath(path) for path in recordings}  # noqa: PTH100 - half the time of Path's
    split = {place: os.path.split(place) for place in places.values()}
    wanted = {place: os.path.splitext(name)[0] for place, (_folder, name) in split.items()}  # noqa: PTH122
    homes: dict[str, set[str]] = {}
    for place, (folder, _name) in split.items():
        homes.setdefault(key(wanted[place]), set()).add(folder)
    if any(len(folders) > 1 for folders in homes.values()):
        below = _below_common({folder for folder, _name in split.values()})
        wanted = {place: _join(below[split[place][0]], stem) for place, stem in wanted.items()}
    uses = Counter(map(key, wanted.values()))
    taken: set[str] = set()
    for place, stem in wanted.items():
        if uses[key(stem)] > 1:
            stem = _join(os.path.dirname(stem), split[place][1])  # noqa: PTH120
        name, number = stem, 1
        while key(name) in taken:  # by a recording whose own name is `x.mp3.wav`
            number += 1
            name = f"{stem} ({number})"
        taken.add(key(name))
        wanted[place] = name
    return {path: wanted[place] for path, place in places.items()}


def _below_common(folders: set[str]) -> dict[str, str]:
    """Each folder relative to the one that all are in; on Windows each drive is a folder."""
    drives = {os.path.splitdrive(folder)[0] for folder in folders}
    if len(drives) == 1:
        common = os.path.commonpath(folders)
        relative = {folder: os.path.relpath(folder, common).replace(os.sep, "/") for folder in folders}
        return {folder: "" if place == "." else place for folder, place in relative.items()}
    return {folder: folder.replace(":", "").replace(os.sep, "/").strip("/") for folder in folders}


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def key(name: str) -> str:
    """The same for names that some disk takes for one."""
    return unicodedata.normalize("NFC", name).casefold()
