"""One recording out of a stream: what a manifest says of it, and its sound where that is not in a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

from resonance.data.addresses import is_address, read_place
from resonance.data.audio import probe, read_audio
from resonance.data.decoders import Samples
from resonance.data.manifest import Utterance
from resonance.data.rows import END_KEYS, START_KEYS, row_reader


class Sample(NamedTuple):
    """Number `number` of unit `unit` of its source. With `fault` (a whole sentence) it cannot be used."""

    utterance: Utterance  # its `audio` says where the recording lies, in messages also where there is `data`
    data: bytes | None = (
        None  # content of the audio file; None: it lies in the file or at the address `utterance.audio`
    )
    fault: str | None = None
    unit: int = 0
    number: int = 0

    def fetched(self) -> Sample:
        """With the content of an audio file that lies on another machine."""
        if self.data is None and is_address(self.utterance.audio):
            return self._replace(data=read_place(self.utterance.audio))
        return self

    def timed(self) -> Sample:
        """With its length from the file's header. Raises AudioError, ShardError."""
        row = self.utterance
        if row.duration is not None:
            return self
        here = self.fetched()
        length = probe(row.audio, here.data).duration
        return here._replace(utterance=replace(row, duration=min(row.end or length, length) - row.start))

    def audio(self) -> Samples:
        """Float32 [samples] at 16 kHz. Raises AudioError, ShardError."""
        row = self.utterance
        return read_audio(row.audio, row.start, row.end, data=self.fetched().data)


class Unit(NamedTuple):
    """A part of a source that is read from its beginning on: a tar file, rows of a table."""

    name: str
    rows: int | None  # samples in it, where that is known without reading all of it


class Source(Protocol):
    """Where samples come from. Units are read in any order, each by any process."""

    @property
    def name(self) -> str: ...

    @property
    def units(self) -> Sequence[Unit]: ...

    @property
    def seconds(self) -> float | None:
        """Of all recordings, where that is known."""

    def fingerprint(self) -> str:
        """Changes when samples or their order do, and not when they are moved elsewhere."""

    def read(self, unit: int, numbers: range) -> Iterator[Sample]:
        """The samples of one unit whose place in it is in `numbers`, in order. Raises ShardError where it is damaged."""


def rows_in(units: Sequence[Unit]) -> int | None:
    """Samples in all of `units`, where that is known."""
    counts = [unit.rows for unit in units]
    return None if None in counts else sum(count or 0 for count in counts)


def embedded_reader(unit: int) -> Callable[[Mapping[str, object], bytes | None, str, int], Sample]:
    """A function from what stands beside a recording, its sound, its name and number to a sample of `unit`.

    Start and end are left out: they say where in a longer recording the clip was, which now is all of it.
    """
    problems: list[str] = []
    names: list[str] = []
    read = row_reader(lambda _name: names[0], problems, lambda _number: names[0])
    left_out = frozenset((*START_KEYS, *END_KEYS))

    def sample(row: Mapping[str, object], data: bytes | None, name: str, number: int) -> Sample:
        problems.clear()
        names[:] = [name]
        kept = {key: value for key, value in row.items() if key not in left_out}
        utterance = read({**kept, "audio_path": "clip"}, number + 1)
        if utterance is None:
            nothing = Utterance(name, "", number + 1)
            return Sample(nothing, data, "; ".join(problems), unit, number)
        return Sample(utterance, data, None, unit, number)

    return sample
