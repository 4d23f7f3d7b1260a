"""The result of a check on the screen and as files."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from resonance.data.check import CheckReport, Kind, Problem
from resonance.data.textfile import write_text_atomic
from resonance.data.writing import write_manifest
from resonance.errors import DataError
from resonance.messages import _

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_ROWS = 3  # of each kind of problem


def write_fixed(report: CheckReport, out: Path) -> tuple[Path, Path]:
    """Write the usable rows and a table of the rows left out with the reasons; returns the two paths.

    `out` is the manifest's name (`.json`, `.jsonl`), or a folder, which gets `labels.json`. The table lies beside it.
    Raises DataError when one of the two is there already, or when no row is left; audio files are not touched.
    """
    is_file = out.suffix in (".json", ".jsonl")
    manifest = out if is_file else out / "labels.json"
    left_out = out.with_name(f"{out.stem}.left_out.csv") if is_file else out / "left_out.csv"
    for path in (manifest, left_out):
        if path.exists():
            raise DataError(_("{path}: already there, and not overwritten. Give another name.").format(path=path))
    if not report.utterances:
        raise DataError(_("No row is left to write: every recording has a problem that rules it out."))
    kept = {(utterance.row, utterance.audio) for utterance in report.utterances}
    reasons: dict[tuple[int, str], list[str]] = defaultdict(list)
    for problem in report.problems:
        if problem.severity == "lost":
            reasons[problem.row, problem.audio].append(problem.message)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["row", "audio", "text", "why"])
    for utterance in report.checked:
        key = (utterance.row, utterance.audio)
        if key not in kept:
            writer.writerow([utterance.row, utterance.audio, utterance.text, "; ".join(reasons[key])])
    write_manifest(manifest, report.utterances)
    # With a byte order mark: without it Excel shows Chinese as question marks.
    write_text_atomic(left_out, [table.getvalue()], bom=True)
    return manifest, left_out


def format_report(report: CheckReport) -> RenderableType:
    """The problems by kind, those that lose rows first, with the first rows of each, and a summary of the whole."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    by_kind: dict[tuple[str, Kind], list[Problem]] = defaultdict(list)
    for problem in report.problems:
        by_kind[problem.severity, problem.kind].append(problem)
    parts: list[RenderableType] = []
    if by_kind:
        table = Table(show_edge=False, pad_edge=False, expand=False)
        table.add_column(_("Row"), justify="right", no_wrap=True)
        table.add_column(_("File"), overflow="fold", max_width=36)
        table.add_column(_("What is wrong"), overflow="fold")
        for (severity, kind), problems in sorted(by_kind.items(), key=lambda item: (item[0][0], -len(item[1]))):
            style = "bold red" if severity == "lost" else "bold yellow"
            table.add_row("", Text(f"{_title(kind)} × {len(problems)}", style), Text(_outcome(severity), style))
            for problem in problems[:SHOWN_ROWS]:
                message = problem.message.removeprefix(f"{problem.audio}: ")
                table.add_row(Text(str(problem.row)), Text(Path(problem.audio).name), Text(message))
            if len(problems) > SHOWN_ROWS:
                table.add_row("", Text(_("… and {count} more").format(count=len(problems) - SHOWN_ROWS), "dim"), "")
            table.add_section()
        parts += [table, Text()]
    return Group(*parts, *(Text(line) for line in _summary(report)))


def _summary(report: CheckReport) -> list[str]:
    usable = report.utterances
    lost = len(report.checked) - len(usable)
    seconds = sorted(utterance.duration or 0.0 for utterance in usable)
    out = [
        _("{usable} of {rows} rows can be used, {hours} of audio.").format(
            usable=len(usable), rows=len(report.checked), hours=_time(sum(seconds))
        )
    ]
    if seconds:
        shortest, median, long, longest = (seconds[round(share * (len(seconds) - 1))] for share in (0, 0.5, 0.9, 1))
        out.append(
            _(
                "Clips last {shortest:.1f} to {longest:.1f} s; half of them {median:.1f} s or less, 90 % {long:.1f} s or less."
            ).format(shortest=shortest, longest=longest, median=median, long=long)
        )
    speakers = Counter(utterance.speaker for utterance in usable if utterance.speaker)
    if speakers:
        out.append(_("Speakers: {names}").format(names=_counts(speakers)))
    languages = Counter(utterance.language for utterance in usable if utterance.language)
    if languages:
        out.append(_("Languages: {names}").format(names=_counts(languages)))
    if lost:
        out.append(
            _(
                "{lost} of {rows} rows would be lost. Correct them, or add --fix OUT to write a list without them."
            ).format(lost=lost, rows=len(report.checked))
        )
    elif report.problems:
        out.append(_("No row is lost. Look at the warnings: each is a likely mistake or a weaker recording."))
    else:
        out.append(_("No problems found."))
    return out


def _time(seconds: float) -> str:
    if seconds >= 3600:
        return _("{hours:.1f} h").format(hours=seconds / 3600)
    return _("{minutes:.1f} min").format(minutes=seconds / 60)


def _counts(counter: Counter[str], most: int = 8) -> str:
    text = ", ".join(f"{name} {count}" for name, count in counter.most_common(most))
    rest = len(counter) - most
    return text + (", " + _("… and {count} more").format(count=rest) if rest > 0 else "")


def _outcome(severity: str) -> str:
    return _("cannot be trained on") if severity == "lost" else _("warning")


def _title(kind: Kind) -> str:
    titles: dict[Kind, str] = {
        "missing": _("file not there"),
        "unreadable": _("file cannot be read"),
        "too_long": _("too long"),
        "too_short": _("too short"),
        "silent": _("silent"),
        "label_too_long": _("text too long"),
        "audio_in_validation": _("recording in training and validation"),
        "clipped": _("recorded too loud"),
        "past_end": _("times behind the file's end"),
        "empty_text": _("no text"),
        "duplicate_row": _("listed twice"),
        "duplicate_audio": _("same audio under two names"),
        "sentence_in_validation": _("sentence in training and validation"),
    }
    return titles[kind]
