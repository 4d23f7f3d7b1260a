"""Parquet files as a source: rows with a text and a recording inside, as Hugging Face datasets are kept, or its path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from resonance.data.addresses import base_name, is_address, join, open_place, parent
from resonance.data.rows import AUDIO_KEYS, TEXT_KEYS, first_of, path_resolver, row_reader
from resonance.data.samples import Sample, Unit, embedded_reader
from resonance.errors import ManifestError, MissingExtraError, ShardError
from resonance.messages import _

ROWS_AT_ONCE = 16  # a row may hold a recording of megabytes


class ParquetFiles:
    """Row groups of parquet files, each a unit."""

    def __init__(self, name: str, files: Sequence[str]) -> None:
        self.name = name
        self.seconds = None
        self.units: list[Unit] = []
        self.groups: list[int] = []  # of each unit: its number in the file
        for file in files:
            with _opened(file) as parquet:
                _check_columns(file, parquet.schema_arrow.names)
                for group in range(parquet.metadata.num_row_groups):
                    self.units.append(Unit(file, parquet.metadata.row_group(group).num_rows))
                    self.groups.append(group)

    def fingerprint(self) -> str:
        lines = (
            f"{base_name(unit.name)} {group} {unit.rows}" for unit, group in zip(self.units, self.groups, strict=True)
        )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def read(self, unit: int, numbers: range) -> Iterator[Sample]:
        file, group = self.units[unit].name, self.groups[unit]
        make = record_reader(file, unit)
        with _opened(file) as parquet:
            number = 0
            for batch in parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group]):
                wanted = [i for i in range(batch.num_rows) if number + i in numbers]
                for i, row in zip(wanted, batch.take(wanted).to_pylist() if wanted else (), strict=True):
                    yield make(row, number + i)
                number += batch.num_rows
                if numbers and number > numbers[-1]:
                    return


def record_reader(place: str, unit: int) -> Any:
    """A function from a record (a recording inside it as `{"bytes", "path"}`, or its path) and its number to a sample."""
    embedded = embedded_reader(unit)
    problems: list[str] = []
    folder = parent(place)
    resolve = (lambda name: join(folder, name)) if is_address(place) else path_resolver([folder])  # type: ignore[list-item]
    plain = row_reader(resolve, problems, lambda number: _("{path}, row {number}").format(path=place, number=number))

    def sample(row: dict[str, object], number: int) -> Sample:
        audio = first_of(row, AUDIO_KEYS)
        if isinstance(audio, dict) and isinstance(data := audio.get("bytes"), bytes):
            return embedded(row, data, f"{place}/{number}_{audio.get('path') or ''}", number)
        problems.clear()
        utterance = plain(row, number)
        if utterance is None:
            from resonance.data.manifest import Utterance

            return Sample(Utterance(place, "", number), None, "; ".join(problems), unit, number)
        return Sample(utterance, unit=unit, number=number)

    return sample


def _check_columns(file: str, names: Sequence[str]) -> None:
    if set(names).isdisjoint(AUDIO_KEYS) or set(names).isdisjoint(TEXT_KEYS):
        raise ManifestError(
            _(
                "{path}: needs a column for the recording ({audio}) and one for what is said ({text}). It has: {found}"
            ).format(path=file, audio=", ".join(AUDIO_KEYS), text=", ".join(TEXT_KEYS), found=", ".join(names))
        )


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(
            _('{path}: parquet files need the package datasets: pip install "resonance-asr[datasets]"').format(
                path=file
            )
        ) from error
    with open_place(file) as stream:
        try:
            yield pyarrow.parquet.ParquetFile(stream)
        except (pyarrow.ArrowException, OSError) as error:
            raise ShardError(
                _("{path}: damaged, cut off or no parquet file ({reason}). Copy or write it again.").format(
                    path=file, reason=error
                )
            ) from error
