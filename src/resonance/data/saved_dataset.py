"""Hugging Face datasets that `save_to_disk` wrote: rows in Arrow files, the audio as paths or as bytes inside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resonance.data.manifest import Utterance
from resonance.data.rows import AUDIO_KEYS, Resolver, first_of, in_row, path_resolver, raise_problems, row_reader
from resonance.data.writing import write_manifest
from resonance.errors import DataError, ManifestError, MissingExtraError
from resonance.messages import _

# One by one, 100,000 rows take 2 s to come out of Arrow; so many at once, 0.2 s. Audio inside the rows is held as long.
ROWS_AT_ONCE = 16


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_saved_dataset(folder: Path, resolve: Resolver) -> list[Utterance]:
    """The rows of a saved dataset whose audio files are on this disk.

    Raises ManifestError when the audio is inside the dataset (what `save_to_disk` does by default; `export_dataset`
    writes it out), for a dataset of several splits and for rows that make no sense; MissingExtraError without the
    package `datasets`.
    """
    problems: list[str] = []
    read = row_reader(resolve, problems, in_row)
    utterances = []
    for number, row in enumerate(_rows(folder), 1):
        audio = first_of(row, AUDIO_KEYS)
        if isinstance(audio, Mapping) and audio.get("bytes") is not None:
            path = audio.get("path")
            if path is None or not Path(resolve(path)).is_file():
                raise ManifestError(_embedded(folder))
        if utterance := read(row, number):
            utterances.append(utterance)
    raise_problems(folder, problems)
    return utterances


def export_dataset(folder: str | Path, out: str | Path) -> Path:
    """Write the audio inside a saved dataset to `out/audio` and its rows to `out/labels.json`, which is returned.

    The audio is copied byte by byte, not decoded. Raises DataError when `out` exists and is not empty.
    """
    folder, out = Path(folder), Path(out)
    if out.exists() and any(out.iterdir()):
        raise DataError(_("{out}: not empty. Give a new folder.").format(out=out))
    audio_folder = out / "audio"
    audio_folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    read = row_reader(path_resolver([Path()]), problems, in_row)
    utterances = []
    for number, row in enumerate(_rows(folder), 1):
        audio = first_of(row, AUDIO_KEYS)
        if isinstance(audio, dict) and audio.get("bytes") is not None:
            name = Path(audio.get("path") or f"clip{suffix_of(audio['bytes'])}").name
            target = audio_folder / f"{number:06}_{name}"
            target.write_bytes(audio["bytes"])
            audio["path"] = str(target)
        if utterance := read(row, number):
            utterances.append(utterance)
    raise_problems(folder, problems)
    write_manifest(out / "labels.json", utterances)
    return out / "labels.json"


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for columns in load_saved(folder).iter(batch_size=ROWS_AT_ONCE):
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def undecoded(dataset: Any) -> Any:
    """The dataset with its recordings as bytes or paths: decoding is ours, and the package's own needs torchcodec and
    FFmpeg."""
    import datasets

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Audio):
            dataset = dataset.cast_column(name, datasets.Audio(decode=False))
    return dataset


def load_saved(folder: Path) -> Any:
    """The dataset in `folder`, of one part, its recordings undecoded. Raises ManifestError, MissingExtraError."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            _(
                "{folder}: this is a Hugging Face dataset, which needs the package datasets: "
                'pip install "resonance-asr[datasets]"'
            ).format(folder=folder)
        ) from error
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if is_saved_dataset(entry))
        if len(splits) != 1:
            raise ManifestError(
                _("{folder}: a dataset with the parts {splits}. Give the folder of one, such as {example}.").format(
                    folder=folder, splits=", ".join(splits) or "–", example=folder / (splits or ["train"])[0]
                )
            )
        folder = folder / splits[0]
    try:
        dataset = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ManifestError(_("{folder}: cannot be read ({reason}).").format(folder=folder, reason=error)) from error
    return undecoded(dataset)


def suffix_of(data: bytes) -> str:
    """The file name ending for audio without a name, from its first bytes."""
    for magic, suffix in (
        (b"RIFF", ".wav"),
        (b"fLaC", ".flac"),
        (b"OggS", ".ogg"),
        (b"ID3", ".mp3"),
        (b"\xff", ".mp3"),
    ):
        if data.startswith(magic):
            return suffix
    return ".m4a" if data[4:8] == b"ftyp" else ".audio"


def _embedded(folder: Path) -> str:
    code = f"from resonance.data.saved_dataset import export_dataset as e; e({str(folder)!r}, 'exported')"
    return _(
        "{folder}: the audio is inside the dataset and not in files of its own. Write it to a folder “exported”, "
        'then give that folder: python -c "{code}"'
    ).format(folder=folder, code=code)
