"""Windows that wait for the model: taken by audio context, so that they can share a batch, and in turn between people."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from resonance.transcribe.recognizer import Transcript
from resonance.units import SAMPLE_RATE

if TYPE_CHECKING:
    from resonance.transcribe.mixed_engine import Row

Person = tuple[str, str | None]  # the account that asks, and the patient whose adapter answers


@dataclass(eq=False)
class Work:
    """One window that waits for its transcript."""

    row: Row
    person: Person
    deadline: float  # on the clock of time.monotonic()
    positions: int  # encoder positions: only windows of equal ones share a batch
    arrived: float = field(default_factory=time.monotonic)
    number: int = 0  # in the order of arrival
    future: Future[Transcript] = field(default_factory=Future)

    @property
    def seconds(self) -> float:
        return len(self.row.audio) / SAMPLE_RATE


class Room(NamedTuple):
    """How many windows of an audio context a batch may have."""

    rows: int
    of_one_person: int


class FairQueue:
    """Not for several threads at once: its owner locks it.

    People stand in a line. A batch has the audio context of the oldest window of the first; the others of that context are
    taken one from each person in turn. Whoever gave the oldest of his own goes to the end of the line. So whoever did not
    comes nearer to the front with every batch, and no window waits for ever, however rare its context is.
    """

    def __init__(self) -> None:
        self._people: OrderedDict[Person, dict[int, deque[Work]]] = OrderedDict()
        self._count = 0
        self._arrived = 0
        self.waiting_since = 0.0  # when the first came into the empty queue, on the clock of time.monotonic()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Work]:
        return (work for lines in self._people.values() for line in lines.values() for work in line)

    def put(self, work: Work) -> None:
        if not self._count:
            self.waiting_since = work.arrived
        self._arrived += 1
        work.number = self._arrived
        self._people.setdefault(work.person, {}).setdefault(work.positions, deque()).append(work)
        self._count += 1

    def remove(self, work: Work) -> bool:
        """Whether it was still waiting."""
        line = self._people.get(work.person, {}).get(work.positions)
        if line is None or work not in line:
            return False
        line.remove(work)
        self._count -= 1
        self._tidy(work.person, work.positions)
        return True

    def take(self, room: Callable[[int], Room]) -> list[Work]:
        """Windows of one audio context for a batch, and out of the queue. room: how many there may be, by positions."""
        if not self._people:
            return []
        first = next(iter(self._people))
        positions = self._oldest(first).positions
        most, of_one = room(positions)
        lines = {person: lines[positions] for person, lines in self._people.items() if positions in lines}
        oldest = {person: self._oldest(person) for person in lines}
        taken: list[Work] = []
        for _turn in range(max(of_one, 1)):
            for line in lines.values():
                if line and len(taken) < max(most, 1):
                    taken.append(line.popleft())
        self._count -= len(taken)
        served = {work.person for work in taken if work is oldest[work.person]}
        for person in lines:
            if person in served:
                self._people.move_to_end(person)
            self._tidy(person, positions)
        return taken

    def clear(self) -> list[Work]:
        """All that waited."""
        everything = sorted(self, key=lambda work: work.number)
        self._people.clear()
        self._count = 0
        return everything

    def _oldest(self, person: Person) -> Work:
        return min((line[0] for line in self._people[person].values()), key=lambda work: work.number)

    def _tidy(self, person: Person, positions: int) -> None:
        lines = self._people[person]
        if not lines[positions]:
            del lines[positions]
        if not lines:
            del self._people[person]
