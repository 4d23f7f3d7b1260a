"""A stream as torch reads it: decoded in worker processes, each step's batches with the place of their reader."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from resonance.data.audio import SPAN_SLACK_SECONDS
from resonance.data.batches import Clip, ClipMaker, Collator
from resonance.data.choice import Choice
from resonance.data.decoders import Samples
from resonance.data.samples import Sample, Source
from resonance.data.stream import Drawn, Reader, Reading, Standing
from resonance.data.workers import outliving_signals
from resonance.errors import DataError
from resonance.messages import _
from resonance.units import SAMPLE_RATE

Batch = dict[str, torch.Tensor]


class Step(NamedTuple):
    """What one rank computes in one optimiser step."""

    batches: list[Batch]
    reader: int  # the worker's number within its rank
    standing: Standing  # behind these batches


@dataclass
class Progress:
    """How far one rank is: what its workers handed out, and in how many steps."""

    steps: int = 0
    standings: dict[int, Standing] = field(default_factory=dict)  # by reader within the rank


@dataclass(frozen=True)
class Layout:
    """Who reads: the seed and the processes."""

    seed: int
    rank: int
    ranks: int
    workers: int  # processes of each rank; 0 reads in the rank itself
    accumulation: int
    batch: int  # clips computed at once
    buffer: int  # clips that a rank holds for shuffling, over all its workers

    @property
    def readers(self) -> int:
        """Of one rank."""
        return max(self.workers, 1)

    def reading(self, reader: int) -> Reading:
        group = self.batch * self.accumulation
        number = self.rank * self.readers + reader
        return Reading(self.seed, number, self.ranks * self.readers, group, self.buffer // self.readers)


class ClipStream(IterableDataset[Step]):
    """Steps without end, decoded when they are drawn. One worker reads its own share, as `layout` says."""

    def __init__(
        self, source: Source, make: ClipMaker, collate: Collator, choice: Choice, layout: Layout, *, skip: bool
    ) -> None:
        self.source = source
        self.make = make
        self.collate = collate
        self.choice = choice
        self.layout = layout
        self.skip = skip
        self.begun = Progress()

    def __iter__(self) -> Iterator[Step]:
        worker = get_worker_info()
        # torch takes its first step from worker 0, whoever's turn it was when the run stopped.
        number = ((worker.id if worker else 0) + self.begun.steps) % self.layout.readers
        reading = self.layout.reading(number)
        reader = Reader(self.source, reading, self.choice, skip=warn if self.skip else None)
        for group, standing in reader.groups(self.begun.standings.get(number, Standing())):
            batches = self._batches(group)
            if batches:
                yield Step(batches, number, standing)

    def _batches(self, group: list[Drawn]) -> list[Batch]:
        """The group in batches at one audio context; none where no recording of it can be read."""
        longest = max(drawn.seconds for drawn in group)
        clips = [self._clip(drawn, longest) for drawn in group]
        good = next((clip for clip in clips if clip), None)
        if good is None:
            return []
        # In place of one that is broken, one of the others without labels: every rank goes on with as many clips.
        whole = [clip or good.without_labels() for clip in clips]
        size = self.layout.batch
        return [self.collate(whole[i : i + size]) for i in range(0, len(whole), size)]

    def _clip(self, drawn: Drawn, longest: float) -> Clip | None:
        sample = drawn.sample
        random = np.random.default_rng((self.layout.seed, drawn.epoch, sample.unit, sample.number))
        try:
            return self.make(sample.utterance, lambda: self._audio(sample), longest, random)
        except DataError as error:
            if not self.skip:
                raise
            warn(str(error))
            return None

    def _audio(self, sample: Sample) -> Samples:
        audio = sample.audio()
        seconds = len(audio) / SAMPLE_RATE
        if seconds > self.choice.max_seconds + SPAN_SLACK_SECONDS:  # the list said less, and the end would be cut off
            raise DataError(
                _("{name}: {found:.2f} seconds long, but listed with {listed:.2f}. Correct its duration.").format(
                    name=sample.utterance.audio, found=seconds, listed=sample.utterance.duration or 0.0
                )
            )
        return audio


def step_loader(stream: ClipStream, *, pin_memory: bool) -> DataLoader[Step]:
    """The stream in its workers. torch's own random numbers stay as they are: a resumed run must draw the same ones."""
    workers = stream.layout.workers
    more: Mapping[str, Any] = {"prefetch_factor": 2} if workers else {}
    generator = torch.Generator()
    generator.manual_seed(stream.layout.seed)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=generator,
        **more,
    )
    outliving_signals(loader)
    return loader


def _as_it_is(step: Any) -> Any:
    return step


def warn(text: str) -> None:
    """Say what is left out. From a worker process, so not through the console of the command."""
    print(_("Left out: {reason}").format(reason=text), file=sys.stderr, flush=True)
