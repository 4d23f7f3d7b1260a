"""Datasets of the Hugging Face hub, and those that `save_to_disk` wrote, as a source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resonance.data.parquet import record_reader
from resonance.data.samples import Sample, Unit
from resonance.data.saved_dataset import load_saved, undecoded
from resonance.errors import MissingExtraError, ShardError
from resonance.messages import _

ROWS_IN_A_UNIT = 100


class SavedDataset:
    """A dataset on this disk, which gives any of its rows."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self.dataset = dataset
        self.seconds = None
        firsts = range(0, len(dataset), ROWS_IN_A_UNIT)
        self.units = [Unit(name, min(ROWS_IN_A_UNIT, len(dataset) - first)) for first in firsts]

    def fingerprint(self) -> str:
        return str(self.dataset._fingerprint)

    def read(self, unit: int, numbers: range) -> Iterator[Sample]:
        make = record_reader(self.name, unit)
        for number in numbers[: len(range(numbers.start, min(numbers.stop, self.units[unit].rows or 0), numbers.step))]:
            yield make(self.dataset[unit * ROWS_IN_A_UNIT + number], number)


class HubDataset:
    """The training part of a dataset on the hub, read shard by shard as it comes."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        self.dataset = dataset
        self.seconds = None
        self.units = [Unit(f"{name} {i}", None) for i in range(dataset.num_shards)]

    def fingerprint(self) -> str:
        # The revision is not known here; features, name and number of shards are.
        return f"{self.name} {self.dataset.num_shards} {sorted(self.dataset.features or {})}"

    def read(self, unit: int, numbers: range) -> Iterator[Sample]:
        make = record_reader(self.name, unit)
        shard = self.dataset.shard(num_shards=len(self.units), index=unit).skip(numbers.start)
        try:
            for number, row in enumerate(shard, numbers.start):
                if number in numbers:
                    yield make(row, number)
                if number + 1 >= numbers.stop:
                    return
        except (OSError, ValueError) as error:
            raise ShardError(
                _("{place}: cannot be read ({reason}).").format(place=self.units[unit].name, reason=error)
            ) from error


def open_saved(folder: Path) -> SavedDataset:
    return SavedDataset(str(folder), load_saved(folder))


def open_hub(name: str) -> HubDataset:
    """The training part of the dataset `name`. Raises ShardError where the hub does not give it."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            _('{place}: datasets of the hub need the package datasets: pip install "resonance-asr[datasets]"').format(
                place=name
            )
        ) from error
    try:
        found = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # the package raises errors of several libraries
        raise ShardError(
            _(
                "{place}: no such file or folder here, and the dataset of that name could not be opened on the hub ({reason})."
            ).format(place=name, reason=error)
        ) from error
    return HubDataset(name, undecoded(found))
