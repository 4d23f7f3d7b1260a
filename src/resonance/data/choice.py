"""Which samples of a stream are trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from resonance.data.samples import Sample
from resonance.errors import DataError
from resonance.languages import language_code
from resonance.messages import _

GroupKey = Callable[[Sample], str]


@dataclass(frozen=True)
class Choice:
    """Which samples are trained on."""

    min_seconds: float
    max_seconds: float
    language: str | None  # given for all; None: each sample's own
    held_out: frozenset[str] = frozenset()  # groups that are measured on
    group_of: GroupKey | None = None

    def __call__(self, sample: Sample) -> Sample | None:
        """The sample with its length and language, None where it is left out. Raises DataError."""
        if self.group_of is not None and self.group_of(sample) in self.held_out:
            return None
        timed = settled(sample.timed(), self.language)
        return timed if self.min_seconds <= (timed.utterance.duration or 0.0) <= self.max_seconds else None


def settled(sample: Sample, given: str | None) -> Sample:
    """The sample with Whisper's code of its own language, or none where `given` speaks for all. Raises DataError."""
    row = sample.utterance
    if row.language is None:
        return sample
    try:
        code = None if given else language_code(row.language)
    except ValueError as error:
        raise DataError(
            _("{name}: language {language}: {reason} Or give --language for all of them.").format(
                name=row.audio, language=repr(row.language), reason=error
            )
        ) from error
    return sample._replace(utterance=replace(row, language=code))
