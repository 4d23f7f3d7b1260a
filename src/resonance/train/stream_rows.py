"""From the settings to what is streamed: the source, what is held out of it, and a few recordings that stand for all."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from resonance.config import TrainConfig, effective_batch
from resonance.data.addresses import base_name, is_address
from resonance.data.choice import Choice
from resonance.data.convert import MEDIA_SUFFIX
from resonance.data.manifest import Utterance
from resonance.data.samples import Sample, Source, rows_in
from resonance.data.saved_dataset import suffix_of
from resonance.data.sources import open_source
from resonance.data.split import sentence_key
from resonance.data.textfile import write_text_atomic
from resonance.errors import ConfigError, DataError
from resonance.messages import _
from resonance.model.runs import RunFolder
from resonance.ranks import ranks
from resonance.units import ALIGNED_SECONDS

HELD_OUT = 500  # recordings measured on, where max_eval_samples does not say: more take longer than they tell
PASSES = 3  # suggested where max_steps is missing
LOOKED_THROUGH = 100_000  # samples from the beginning among which those held out are looked for


@dataclass(frozen=True, slots=True)
class Stream:
    """What is trained on, without a list of it."""

    source: Source
    choice: Choice
    fingerprint: str
    mean_seconds: float  # of the recordings looked at

    @property
    def rows(self) -> int | None:
        """All samples of the source, those left out and held out included, where their number is known."""
        return rows_in(self.source.units)

    @property
    def hours(self) -> float | None:
        """As the index says, else estimated from the recordings looked at; None where nobody knows how many there are."""
        if self.source.seconds is not None:
            return self.source.seconds / 3600
        return None if self.rows is None else self.rows * self.mean_seconds / 3600

    def up_to(self, seconds: float) -> Stream:
        return replace(self, choice=replace(self.choice, max_seconds=min(self.choice.max_seconds, seconds)))


def read_stream(
    config: TrainConfig, console: Console, clips: Path | None
) -> tuple[Stream, list[Utterance], list[Utterance]]:
    """The stream, some of its recordings, and the recordings held out of it, which are measured on.

    Recordings that are not files here are written into the folder `clips`, under names of our own (None: not written, for a
    plan). Raises ConfigError where max_steps is missing, DataError for what cannot be read.
    """

    def warn(text: str) -> None:
        console.print(text, style="yellow", soft_wrap=True, highlight=False)

    place = config.train_file if config.train_file is not None else config.dataset_dir
    if place is None:  # the schema asks for one of the two
        raise DataError(_("Give the recordings with --train_file, or with --dataset_dir and --json_file."))
    source = open_source(
        place,
        dataset_dir=config.dataset_dir,
        json_file=config.json_file if config.train_file is None else None,
        skip_broken=config.skip_broken,
        warn=warn,
    )
    if config.max_steps is None and clips is not None:
        raise ConfigError([steps_missing(config, rows_in(source.units))])
    longest = config.max_audio_len
    if isinstance(config.audio_context, float):
        longest = min(longest, config.audio_context)
    choice = Choice(config.min_audio_len, longest, config.language)
    held_out: list[Utterance] = []
    if config.validation_file:
        other = open_source(
            config.validation_file, dataset_dir=config.dataset_dir, skip_broken=config.skip_broken, warn=warn
        )
        found = _usable(other, choice, config, range(len(other.units)))
        held_out = [_kept(sample, clips, "held_out") for sample in itertools.islice(found, config.max_eval_samples)]
    elif config.validation_split:
        choice, held_out = _held_out(source, choice, config, clips)
    sample = _some(source, choice, config, clips)
    mean = sum(row.duration or 0.0 for row in sample) / len(sample)
    # Evaluation runs in the order of length, so that batches need little padding.
    held_out.sort(key=lambda row: row.duration or 0.0)
    return Stream(source, choice, source.fingerprint(), mean), sample, held_out


def steps_missing(config: TrainConfig, rows: int | None) -> str:
    text = _("streaming needs max_steps: a stream is read for as many updates as you say.") + " "
    if rows is None:
        return text + _("Give --max_steps, for example {steps}.").format(steps=1024)
    batch = effective_batch(config, max(ranks().world, config.processes))
    return text + _(
        "Give --max_steps {steps}: {passes} passes through {rows} recordings with {batch} in each update."
    ).format(steps=max(1, -(-PASSES * rows // batch)), passes=PASSES, rows=rows, batch=batch)


def write_stream(stream: Stream, run: RunFolder) -> None:
    """In place of the list of rows: what was streamed, and a mark by which it is known again."""
    values = {
        "source": stream.source.name,
        "fingerprint": stream.fingerprint,
        "rows": stream.rows,
        "hours": stream.hours,
    }
    write_text_atomic(run.stream, [json.dumps(values, ensure_ascii=False, indent=1) + "\n"])


def check_stream(stream: Stream, run: RunFolder) -> None:
    """Raise DataError when the checkpoints in `run` were trained on other data."""
    if run.latest_checkpoint() is None or not run.stream.is_file():
        return
    before = json.loads(run.stream.read_text(encoding="utf-8"))
    if before["fingerprint"] != stream.fingerprint:
        raise DataError(
            _(
                "{path}: this training was begun with other data: {before} ({rows_before} recordings); now it is {now} "
                "({rows_now}). Continue it with the old data, or choose another --output_dir for a new training."
            ).format(
                path=run.path,
                before=before["source"],
                rows_before=_count(before["rows"]),
                now=stream.source.name,
                rows_now=_count(stream.rows),
            )
        )


def _count(rows: int | None) -> str:
    return _("an unknown number") if rows is None else str(rows)


def _usable(source: Source, choice: Choice, config: TrainConfig, units: range | list[int]) -> Iterator[Sample]:
    """The samples of these units one after the other, without what `choice` leaves out."""
    for unit in units:
        rows = source.units[unit].rows
        try:
            for sample in source.read(unit, range(sys.maxsize if rows is None else rows)):
                try:
                    if sample.fault:
                        raise DataError(sample.fault)
                    found = choice(sample)
                except DataError:
                    if not config.skip_broken:
                        raise
                    continue  # said when it is trained on
                if found:
                    yield found
        except DataError:
            if not config.skip_broken:
                raise


def _shuffled_units(source: Source, seed: int) -> list[int]:
    """An order of units that is none of an epoch's: in some lists the first hundred rows are one speaker's."""
    order: list[int] = np.random.default_rng((seed, 2**32)).permutation(len(source.units)).tolist()
    return order


def _held_out(
    source: Source, choice: Choice, config: TrainConfig, clips: Path | None
) -> tuple[Choice, list[Utterance]]:
    """The choice without the sentences (or speakers) that are measured on, and their recordings.

    Whether a sentence is one of them depends on its letters and the seed; looking for them ends when there are enough. No
    other sentence is kept out of the training, and none of these is in it, wherever in the data it occurs again.
    """
    group_of = _speaker if config.split_by == "speaker" else _sentence
    most = config.max_eval_samples or HELD_OUT
    chosen: list[Sample] = []
    first: tuple[int, str] | None = None
    found = _usable(source, choice, config, _shuffled_units(source, config.seed))
    for sample in itertools.islice(found, LOOKED_THROUGH):
        draw = _draw(config.seed, group_of(sample))
        first = min(first or (draw, group_of(sample)), (draw, group_of(sample)))
        if draw < config.validation_split * 2**64:
            chosen.append(sample._replace(data=None) if clips is None else sample)
            if len(chosen) >= most:
                break
    if first is None:
        raise DataError(_("{place}: nothing in it can be trained on.").format(place=source.name))
    if not chosen:  # little data: the sentence that comes nearest
        again = _usable(source, choice, config, _shuffled_units(source, config.seed))
        chosen = [sample for sample in again if group_of(sample) == first[1]][:most]
    groups = frozenset(group_of(sample) for sample in chosen)
    return replace(choice, held_out=groups, group_of=group_of), [_kept(s, clips, "held_out") for s in chosen]


def _sentence(sample: Sample) -> str:
    # Recordings of noise have no sentence in common: each is a group of its own.
    return sentence_key(sample.utterance.text) or f"\0{sample.unit} {sample.number}"


def _speaker(sample: Sample) -> str:
    if sample.utterance.speaker is None:
        raise DataError(
            _("{name}: does not say who speaks. Add “speaker” to each recording, or split by sentence.").format(
                name=sample.utterance.audio
            )
        )
    return sample.utterance.speaker


def _draw(seed: int, group: str) -> int:
    """A number below 2**64 that is the same on every machine, unlike hash()."""
    data = f"{seed}\0{group}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _some(source: Source, choice: Choice, config: TrainConfig, clips: Path | None) -> list[Utterance]:
    """Recordings that are trained on, as many as the audio context is fitted with."""
    rows: list[Utterance] = []
    seconds = 0.0
    for sample in _usable(source, choice, config, _shuffled_units(source, config.seed)):
        seconds += sample.utterance.duration or 0.0
        if rows and seconds > ALIGNED_SECONDS:
            break
        rows.append(_kept(sample, clips, "sample"))
    if not rows:
        raise DataError(
            _(
                "{place}: no recording to train on is between {least:g} and {most:g} seconds long, or all of them have the "
                "sentences that are held out. Check --max_audio_len and --validation_split."
            ).format(place=source.name, least=choice.min_seconds, most=choice.max_seconds)
        )
    return rows


def _kept(sample: Sample, clips: Path | None, part: str) -> Utterance:
    """The sample as a row with a file, written where it has none. Never under a name from the data."""
    row = sample.utterance
    if clips is None or (sample.data is None and not is_address(row.audio)):
        return row
    data = sample.fetched().data or b""
    ending = Path(base_name(row.audio)).suffix.lower()
    ending = ending if MEDIA_SUFFIX.fullmatch(ending) else suffix_of(data)
    path = clips / part / f"{sample.unit:06}-{sample.number:06}{ending}"
    if not path.is_file() or path.stat().st_size != len(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.part")
        temporary.write_bytes(data)
        temporary.replace(path)
    return replace(row, audio=str(path))
