"""Who is let in: so much audio may wait, in all and for each person, and no more."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

from resonance.messages import _
from resonance.serve.fair_queue import Person
from resonance.serve.faults import ServiceError

LONGEST_WAIT = 600  # seconds that anybody is told to wait before asking again


class Place:
    """What one request takes of the room there is."""

    def __init__(self, admission: Admission, person: Person) -> None:
        self._admission, self._person = admission, person
        self.seconds = 0.0  # of audio, not answered yet

    def resize(self, seconds: float) -> None:
        """So long the recording is, as is known now. Raises ServiceError 429 where there is no room for it."""
        self._admission._change(self._person, -self.seconds)
        self.seconds = 0.0
        self._admission._check(self._person, seconds)
        self._admission._change(self._person, seconds)
        self.seconds = seconds

    def answered(self, seconds: float) -> None:
        """So much of it does not wait any more."""
        seconds = min(seconds, self.seconds)
        self._admission._change(self._person, -seconds)
        self.seconds -= seconds


class Admission:
    """Seconds of audio that wait or are being decoded. Used from one event loop.

    Whoever has nothing waiting may bring a recording of any length where nobody else waits either: otherwise one that is
    longer than the limit could never be transcribed.
    """

    def __init__(self, most: float, most_per_person: float, throughput: Callable[[], float]) -> None:
        """throughput: gives seconds of audio decoded in a second."""
        self._most, self._most_per_person, self._throughput = most, most_per_person, throughput
        self._waiting: dict[Person, float] = {}

    @property
    def seconds(self) -> float:
        return sum(self._waiting.values())

    @contextlib.contextmanager
    def enter(self, person: Person, seconds: float) -> Iterator[Place]:
        """A place for so many seconds. Raises ServiceError 429 too_busy or person_too_busy."""
        place = Place(self, person)
        place.resize(seconds)
        try:
            yield place
        finally:
            place.answered(place.seconds)

    def _check(self, person: Person, seconds: float) -> None:
        own, whole = self._waiting.get(person, 0.0), self.seconds
        if own and own + seconds > self._most_per_person:
            raise ServiceError(
                429,
                "person_too_busy",
                _("{waiting:.0f} s of audio of this person are waiting already; {most:.0f} s may.").format(
                    waiting=own, most=self._most_per_person
                ),
                _("Wait for the answers before you send more."),
                # People share what the model can do.
                retry_after=self._after((own + seconds - self._most_per_person) * len(self._waiting)),
            )
        if whole and whole + seconds > self._most:
            raise ServiceError(
                429,
                "too_busy",
                _("{waiting:.0f} s of audio are waiting already; {most:.0f} s may.").format(
                    waiting=whole, most=self._most
                ),
                _("Send it again after the seconds that Retry-After gives."),
                retry_after=self._after(min(whole, whole + seconds - self._most)),
            )

    def _after(self, audio_seconds: float) -> int:
        return max(1, min(LONGEST_WAIT, math.ceil(audio_seconds / self._throughput())))

    def _change(self, person: Person, seconds: float) -> None:
        left = self._waiting.get(person, 0.0) + seconds
        if left > 1e-6:
            self._waiting[person] = left
        else:
            self._waiting.pop(person, None)
