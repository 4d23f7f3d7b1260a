"""Every manifest format in. The format is found by looking at the content, not at the file's name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from resonance.data.kaldi import is_kaldi_folder, read_kaldi
from resonance.data.manifest import Manifest, Utterance
from resonance.data.rows import (
    AUDIO_KEYS,
    TEXT_KEYS,
    Resolver,
    excerpt,
    first_of,
    in_line,
    in_row,
    path_resolver,
    raise_problems,
    row_reader,
)
from resonance.data.saved_dataset import is_saved_dataset, read_saved_dataset
from resonance.data.textfile import lines, read_text
from resonance.data.writing import write_manifest
from resonance.errors import ManifestError
from resonance.messages import _

__all__ = ["load_manifest", "write_manifest"]

# What a data folder's manifest is called. Anything else in the folder is named in the error and not guessed at.
MANIFEST_STEMS = ("labels", "metadata", "manifest", "train", "validated", "validation", "valid", "dev", "eval", "test")
MANIFEST_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")

_white_space = re.compile(r"[ \t\n\r]*").match


def load_manifest(
    path: str | Path, *, dataset_dir: Path | None = None, json_file: str | None = None, addresses: bool = False
) -> Manifest:
    """All utterances of the manifest at `path`: a JSON list or map, JSON lines, a CSV or TSV table, a Kaldi folder, a
    dataset saved with `save_to_disk`, or a folder with one of these in it.

    Relative audio paths are looked up beside the manifest, then in `dataset_dir`. With `json_file`, the manifest is
    the file of that name in `dataset_dir` (in `path` when there is no `dataset_dir`). The audio files themselves are
    not looked at; with `addresses` they may lie on another machine. Raises ManifestError, which names all rows at fault at
    once.
    """
    path = Path(path)
    if json_file is not None:
        dataset_dir = dataset_dir or path
        path = dataset_dir / json_file
    if not path.exists():
        raise ManifestError(_("{path}: no such file or folder. Check the spelling.").format(path=path))
    if path.name == "wav.scp":
        path = path.parent
    if path.is_dir():
        path = _manifest_in_folder(path)
    if path.is_dir():
        name, utterances = _read_folder(path, dataset_dir)
    else:
        name, utterances = _read_file(path, dataset_dir, addresses)
    if not utterances:
        raise ManifestError(_("{path}: there are no rows in it. List at least one recording.").format(path=path))
    return Manifest(path, name, utterances)


def _not_a_file(row: Utterance) -> str:
    return _("row {row}: {value} is an address, not a file: add --streaming, or download it and give its path").format(
        row=row.row, value=excerpt(row.audio)
    )


def _manifest_in_folder(folder: Path) -> Path:
    """The one manifest of a data folder: a file in it, or the folder itself (Kaldi, saved dataset)."""
    if is_saved_dataset(folder):
        return folder
    found = sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix in MANIFEST_SUFFIXES and entry.stem in MANIFEST_STEMS and entry.is_file()
    )
    names = [entry.name for entry in found] + (["wav.scp"] if is_kaldi_folder(folder) else [])
    if len(names) > 1:
        raise ManifestError(
            _("{folder}: several lists of recordings are in it: {names}. Give the path of the one to use.").format(
                folder=folder, names=", ".join(names)
            )
        )
    if not names and any(entry.suffix in (".tar", ".parquet") for entry in folder.iterdir()):
        raise ManifestError(
            _("{folder}: tar or parquet files and no list of recordings. To train on them, add --streaming.").format(
                folder=folder
            )
        )
    if not names:
        raise ManifestError(
            _(
                "{folder}: no list of recordings in it. Put a file labels.json there, such as "
                '[{{"audio": "audio/001.wav", "text": "what is said"}}], or give the path of the list itself.'
            ).format(folder=folder)
        )
    return found[0] if found else folder


def _read_folder(folder: Path, dataset_dir: Path | None) -> tuple[str, list[Utterance]]:
    resolve = path_resolver([folder, *_clips(folder), *([dataset_dir] if dataset_dir else [])])
    if is_saved_dataset(folder):
        return "saved dataset", read_saved_dataset(folder, resolve)
    return "Kaldi folder", read_kaldi(folder, resolve)


def _read_file(path: Path, dataset_dir: Path | None, addresses: bool) -> tuple[str, list[Utterance]]:
    text = read_text(path)
    folder = path.parent
    roots = [folder, *_clips(folder)]
    if dataset_dir is not None:
        roots += [dataset_dir, *_clips(dataset_dir)]
    resolve = path_resolver(roots)
    problems: list[str] = []
    start = _white_space(text).end()  # type: ignore[union-attr] # the pattern matches the empty string
    try:
        if text.startswith("[", start):
            name, utterances = "JSON list", _read_json_list(text, start, resolve, problems)
        elif text.startswith("{", start):
            name, utterances = _read_json_object(text, start, resolve, problems)
        elif start == len(text):
            return "", []
        else:
            name, utterances = _read_table(path, text, resolve, problems)
    except json.JSONDecodeError as error:
        raise ManifestError(f"{path}: {_json_fault(error)}") from None
    except RecursionError:
        raise ManifestError(_("{path}: not a list of recordings: too many brackets.").format(path=path)) from None
    if not addresses:
        problems += [_not_a_file(row) for row in utterances if "://" in row.audio]
    raise_problems(path, problems)
    return name, utterances


def _clips(folder: Path) -> list[Path]:
    """Common Voice keeps the audio in a folder `clips` beside its tables, and names it without that folder."""
    return [folder / "clips"] if (folder / "clips").is_dir() else []


def _read_json_list(text: str, start: int, resolve: Resolver, problems: list[str]) -> list[Utterance]:
    """Element by element: json.loads would hold 100,000 dictionaries beside the utterances, 60 MB more at the peak."""
    read = row_reader(resolve, problems, in_row)
    rows = (read(value, number) for number, value in enumerate(_elements(text, start), 1))
    return [row for row in rows if row]


def _elements(text: str, start: int) -> Iterator[object]:
    decode = json.JSONDecoder().raw_decode
    position = _skip(text, start + 1)
    if not text.startswith("]", position):
        while True:
            value, position = decode(text, position)
            yield value
            position = _skip(text, position)
            if not text.startswith(",", position):
                break
            position = _skip(text, position + 1)
    if not text.startswith("]", position):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    position = _skip(text, position + 1)
    if position < len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _skip(text: str, position: int) -> int:
    return _white_space(text, position).end()  # type: ignore[union-attr] # the pattern matches the empty string


def _read_json_object(text: str, start: int, resolve: Resolver, problems: list[str]) -> tuple[str, list[Utterance]]:
    """A map of file names to texts, one row, or the first of many lines that are each a row."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except json.JSONDecodeError:
        if "\n{" not in text:
            raise
        return "JSON lines", read_json_lines(text, resolve, problems)
    end = _skip(text, end)
    if end < len(text):
        if not text.startswith("{", end):
            raise json.JSONDecodeError("Extra data", text, end)
        return "JSON lines", read_json_lines(text, resolve, problems)
    read = row_reader(resolve, problems, in_row)
    if first_of(value, AUDIO_KEYS) is not None and first_of(value, TEXT_KEYS) is not None:
        row = read(value, 1)
        return "JSON lines", [row] if row else []
    utterances = []
    # The pairs and not the dictionary: a file listed twice must reach the check for duplicates.
    for number, (name, said) in enumerate(json.loads(text, object_pairs_hook=list), 1):
        if not isinstance(said, str):
            problems.append(
                _('{where}: expected "file name": "what is said", found "{name}": {value}').format(
                    where=in_row(number), name=excerpt(name), value=excerpt(value[name])
                )
            )
        elif row := read({"audio": name, "text": said}, number):
            utterances.append(row)
    return "JSON map", utterances


def read_json_lines(text: str, resolve: Resolver, problems: list[str], first_line: int = 1) -> list[Utterance]:
    """The rows of JSON lines; a line that makes no sense goes into `problems`."""
    read = row_reader(resolve, problems, in_line)
    utterances = []
    for number, line in enumerate(lines(text), first_line):
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            problems.append(_json_fault(error, line=number))
            continue
        if row := read(value, number):
            utterances.append(row)
    return utterances


def _json_fault(error: json.JSONDecodeError, line: int | None = None) -> str:
    """Where the JSON is wrong, with that part of the line; `line` when `error` knows only one line of a file."""
    before = error.doc[max(error.pos - 40, 0) : error.pos]
    after = error.doc[error.pos : error.pos + 40].partition("\n")[0]
    reason = error.msg
    if after.startswith(("]", "}")) and before.rstrip().endswith(","):
        reason = _("take away the comma before {bracket}").format(bracket=after[0])
    return _("line {line}, column {column}: not valid JSON ({reason}). Look at ▶ in: {before}▶{after}").format(
        line=line or error.lineno,
        column=error.colno,
        reason=reason,
        before=before.replace("\r", "").replace("\n", "⏎"),
        after=after.rstrip(),
    )


def _read_table(path: Path, text: str, resolve: Resolver, problems: list[str]) -> tuple[str, list[Utterance]]:
    delimiter, names = columns_of(path, text)
    rows = text[len(next(lines(text))) :]
    utterances = read_table_rows(rows, delimiter, names, resolve, problems, first_line=2)
    return ("TSV table" if delimiter == "\t" else "CSV table"), utterances


def read_table_rows(
    text: str, delimiter: str, names: list[str], resolve: Resolver, problems: list[str], first_line: int
) -> list[Utterance]:
    """The rows of a table behind its first line; a row that makes no sense goes into `problems`."""
    read = row_reader(resolve, problems, in_line)
    utterances = []
    number = first_line - 1
    try:
        for number, fields in _fields(text, delimiter, first_line):
            if not any(fields):
                continue
            if len(fields) > len(names) and any(fields[len(names) :]):
                problems.append(
                    _(
                        "{where}: {found} fields, but the first line names {expected}: put quotes around the text"
                    ).format(where=in_line(number), found=len(fields), expected=len(names))
                )
            elif row := read(dict(zip(names, fields, strict=False)), number):
                utterances.append(row)
    except csv.Error as error:
        problems.append(
            _(
                "{where}: a text in quotes is not closed or goes on behind them ({reason}). "
                'Write a quote inside a text twice: "she said ""yes"""'
            ).format(where=in_line(number + 1), reason=error)
        )
    return utterances


def columns_of(path: str | Path, text: str) -> tuple[str, list[str]]:
    """The delimiter and the column names of a table, from its first line."""
    header = next(lines(text))
    candidates = []
    for delimiter in "\t,;|":
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        candidates.append((delimiter, names))
        if not set(names).isdisjoint(AUDIO_KEYS) and not set(names).isdisjoint(TEXT_KEYS):
            return delimiter, names
    found = max((names for delimiter, names in candidates), key=len)
    raise ManifestError(
        _(
            "{path}: not understood. A list of recordings is JSON, or a table whose first line names the columns: one of "
            "{audio} for the files and one of {text} for what is said. The first line here has: {found}"
        ).format(
            path=path, audio=", ".join(AUDIO_KEYS), text=", ".join(TEXT_KEYS), found=excerpt(", ".join(found), 120)
        )
    )


def _fields(text: str, delimiter: str, first_line: int) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table, each with the line it begins in."""
    if delimiter == "\t":
        for number, line in enumerate(lines(text), first_line):
            yield number, [_unquoted(field) for field in line.rstrip("\r\n").split("\t")]
        return
    # strict: without it a quote that is never closed swallows the rest of the file without a word.
    reader = csv.reader(lines(text), delimiter=delimiter, strict=True)
    number = first_line
    for fields in reader:
        yield number, fields
        number = reader.line_num + first_line


def _unquoted(field: str) -> str:
    """Common Voice writes tab-separated fields as they are, quotes included; spreadsheets quote them as in CSV."""
    if len(field) < 2 or not (field[0] == field[-1] == '"'):
        return field
    inner = field[1:-1]
    return inner.replace('""', '"') if '"' not in inner.replace('""', "") else field
