"""The order in which samples come: which process reads which, shuffled and put together by length, and where it stands.

The order is a function of the seed, the epoch and the numbers of the reader and of all readers, and of nothing else. A
reader is one worker process of one rank. Where it stands is therefore a few numbers: where its pool begins in the source, and
how many groups of the pool were handed out. Going on from there reads that one pool again and opens no other clip.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from resonance.data.samples import Sample, Source, Unit, rows_in
from resonance.errors import DataError, ShardError
from resonance.messages import _

MIXING = 0.05  # lengths are compared with +-5 % noise: neighbours change from epoch to epoch
BUFFER_BYTES = 256 << 20  # of undecoded audio that one reader holds at most, give or take a group

Keep = Callable[[Sample], Sample | None]  # the sample as it is trained on; None leaves it out. Raises DataError


class Position(NamedTuple):
    """A place in what one reader reads: the epoch, the part of its share, and the number of the next sample there."""

    epoch: int = 0
    part: int = 0
    number: int = 0


class Standing(NamedTuple):
    """Where a reader stands: all that is needed to go on with the very next group."""

    start: Position = Position()  # of its pool
    done: int = 0  # groups of the pool handed out
    left_out: int = 0  # samples that were not kept, before the pool


class Drawn(NamedTuple):
    sample: Sample
    epoch: int

    @property
    def seconds(self) -> float:
        return self.sample.utterance.duration or 0.0


class Part(NamedTuple):
    unit: int
    numbers: range


class Reading(NamedTuple):
    """Which of all readers this is, and the size of its groups and of its buffer."""

    seed: int
    reader: int
    readers: int
    group: int  # clips of one optimiser step of one rank
    buffer: int  # clips


def share(units: Sequence[Unit], reading: Reading, epoch: int) -> list[Part]:
    """What one reader reads in one epoch: over all readers each sample exactly once.

    Where the numbers of samples are known, each reader gets equally many, in whole units but for the first and last.
    Where they are not, whole units; where there are fewer of these than readers, every n-th sample of all.
    """
    order = np.random.default_rng((reading.seed, epoch)).permutation(len(units)).tolist()
    total = rows_in(units)
    if total is None:
        if len(units) >= reading.readers:
            return [Part(unit, range(sys.maxsize)) for unit in order[reading.reader :: reading.readers]]
        return [Part(unit, range(reading.reader, sys.maxsize, reading.readers)) for unit in order]
    first, last = (total * (reading.reader + i) // reading.readers for i in (0, 1))
    parts, before = [], 0
    for unit in order:
        rows = units[unit].rows or 0
        numbers = range(max(first - before, 0), min(last - before, rows))
        if numbers:
            parts.append(Part(unit, numbers))
        before += rows
    return parts


def strided(units: Sequence[Unit], readers: int) -> bool:
    """Whether every reader has to read everything, to keep every n-th sample."""
    return rows_in(units) is None and len(units) < readers


class _Fed(NamedTuple):
    """A sample that is kept, the position behind it, and how many were not kept until then."""

    drawn: Drawn
    after: Position
    left_out: int


class _Feed:
    """Samples one after the other, the next one known."""

    def __init__(self, fed: Iterator[_Fed]) -> None:
        self._fed = fed
        self._next: _Fed | None = None

    def peek(self) -> _Fed:
        if self._next is None:
            self._next = next(self._fed)
        return self._next

    def take(self) -> _Fed:
        found, self._next = self.peek(), None
        return found


@dataclass
class _Pool:
    start: Position
    left_out_before: int
    end: Position  # behind the last sample
    left_out: int
    drawn: list[Drawn] = field(default_factory=list)
    size: int = 0  # bytes

    def add(self, fed: _Fed) -> None:
        self.drawn.append(fed.drawn)
        self.end, self.left_out = fed.after, fed.left_out
        self.size += len(fed.drawn.sample.data or b"")

    def next(self) -> _Pool:
        return _Pool(self.end, self.left_out, self.end, self.left_out)


class Reader:
    """Groups of clips of similar length, without end: behind an epoch comes the next.

    `keep` decides about each sample; what cannot be read raises DataError, or is left out and told to `skip`.
    """

    def __init__(
        self, source: Source, reading: Reading, keep: Keep, *, skip: Callable[[str], None] | None = None
    ) -> None:
        self.source = source
        self.reading = reading
        self.keep = keep
        self.skip = skip
        # Two pools are held: one is handed out while the next is read.
        self.pool_clips = max(1, reading.buffer // (2 * reading.group)) * reading.group

    def groups(self, standing: Standing = Standing()) -> Iterator[tuple[list[Drawn], Standing]]:  # noqa: B008 - immutable
        """Each group, and where the reader stands behind it. Begins behind `standing`."""
        feed = _Feed(self._feed(standing.start, standing.left_out))
        start, done, left_out = standing
        pool = self._filled(_Pool(start, left_out, start, left_out), feed)
        while True:
            ahead = pool.next()
            for number, group in enumerate(self._arranged(pool)):
                if number >= done:
                    yield group, Standing(pool.start, number + 1, pool.left_out_before)
                for _clip in group:  # read as much as was handed out: the next pool is there in time
                    if not self._full(ahead, feed):
                        ahead.add(feed.take())
            pool, done = self._filled(ahead, feed), 0

    def _full(self, pool: _Pool, feed: _Feed) -> bool:
        if not pool.drawn or len(pool.drawn) % self.reading.group:
            return False
        if len(pool.drawn) >= self.pool_clips or pool.size >= BUFFER_BYTES // 2:
            return True
        # An epoch ends in its own pool, so that epochs mix in one group at most.
        return feed.peek().drawn.epoch > pool.drawn[0].epoch

    def _filled(self, pool: _Pool, feed: _Feed) -> _Pool:
        while not self._full(pool, feed):
            pool.add(feed.take())
        return pool

    def _arranged(self, pool: _Pool) -> list[list[Drawn]]:
        """The pool in groups of similar length, in random order."""
        random = np.random.default_rng((self.reading.seed, self.reading.reader, *pool.start))
        count = len(pool.drawn)
        seconds = np.array([drawn.seconds for drawn in pool.drawn]) * random.uniform(1 - MIXING, 1 + MIXING, count)
        # Shuffled first: clips of equal length keep no neighbours.
        order = random.permutation(count)
        order = order[np.argsort(seconds[order], kind="stable")]
        groups = order.reshape(-1, self.reading.group)
        return [[pool.drawn[i] for i in groups[g]] for g in random.permutation(len(groups))]

    def _feed(self, start: Position, left_out: int) -> Iterator[_Fed]:
        """The samples that are kept from `start` on."""
        epoch, first_part, first_number = start
        while True:
            kept = 0
            for number, part in enumerate(share(self.source.units, self.reading, epoch)):
                if number < first_part:
                    continue
                unit, numbers = part
                if first_number:
                    numbers = range(first_number, numbers.stop, numbers.step)
                first_part = first_number = 0
                for sample in self._samples(unit, numbers):
                    if sample is None:
                        left_out += 1
                        continue
                    kept += 1
                    after = Position(epoch, number, sample.number + numbers.step)
                    yield _Fed(Drawn(sample, epoch), after, left_out)
            if not kept and start == Position(epoch, 0, 0):
                raise DataError(_nothing_kept(self.source.name, self.reading))
            epoch += 1
            start = Position(epoch)
            first_part = first_number = 0

    def _samples(self, unit: int, numbers: range) -> Iterator[Sample | None]:
        """The samples of one part; None for each that is left out."""
        if not numbers:
            return
        try:
            for sample in self.source.read(unit, numbers):
                try:
                    if sample.fault:
                        raise DataError(sample.fault)
                    found = self.keep(sample)
                except DataError as error:
                    if self.skip is None:
                        raise
                    self.skip(str(error))
                    found = None
                yield found
        except ShardError as error:
            if self.skip is None:
                raise
            self.skip(str(error))


def _nothing_kept(name: str, reading: Reading) -> str:
    if reading.readers > 1:
        return _(
            "{place}: nothing to train on for reader {reader} of {readers} (each process and each of its workers is one). "
            "Use fewer --dataloader_num_workers, or check --max_audio_len."
        ).format(place=name, reader=reading.reader + 1, readers=reading.readers)
    return _("{place}: nothing in it can be trained on. Check --min_audio_len and --max_audio_len.").format(place=name)
