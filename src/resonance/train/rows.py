"""From a manifest to the rows that are trained on and the rows that are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from resonance.config import TrainConfig
from resonance.data.check import probe_durations
from resonance.data.formats import load_manifest
from resonance.data.manifest import Utterance
from resonance.data.split import split
from resonance.data.tokens import LabelTokenizer
from resonance.errors import DataError
from resonance.languages import language_code
from resonance.messages import _
from resonance.train.stream_rows import Stream, read_stream

SHOWN = 5  # left-out rows that are named on the screen


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows with known durations. `held_out` is empty when nothing is to be evaluated.

    With a `stream`, that is what is trained on, and `train` are some of its recordings, which stand for all.
    """

    train: list[Utterance]
    held_out: list[Utterance]
    stream: Stream | None = None

    def up_to(self, seconds: float) -> Rows:
        """Without the recordings that are longer."""
        train, held_out = (
            [row for row in rows if (row.duration or 0.0) <= seconds] for rows in (self.train, self.held_out)
        )
        return Rows(train, held_out, self.stream and self.stream.up_to(seconds))

    @property
    def count(self) -> int | None:
        """Recordings that are trained on, where that is known."""
        return self.stream.rows if self.stream else len(self.train)

    @property
    def hours(self) -> float | None:
        if self.stream:
            return self.stream.hours
        return sum(row.duration or 0.0 for row in self.train) / 3600


def read_rows(config: TrainConfig, console: Console, clips: Path | None = None) -> Rows:
    """All rows of the configuration's manifests whose clips can be trained on, or the stream of them.

    Recordings out of a stream that are not files are written into the folder `clips`, where one is given. Raises DataError listing every file that is missing or unreadable. Clips outside the length limits are left out and
    named.
    """
    if config.streaming:
        stream, some, measured = read_stream(config, console, clips)
        return Rows(some, measured, stream)
    train = settle_languages(probe_durations(_manifest(config.train_file, config)), config.language)
    held_out: list[Utterance] = []
    if config.validation_file:
        held_out = settle_languages(probe_durations(_manifest(config.validation_file, config)), config.language)
    elif config.validation_split:
        try:
            # Before any length is left out: another max_audio_len must not put held-out recordings into the training.
            train, held_out = split(train, eval_fraction=config.validation_split, by=config.split_by, seed=config.seed)
        except DataError as error:
            raise DataError(
                _("{reason} To train without knowing how good the result is: --validation_split 0.").format(
                    reason=error
                )
            ) from error
    train = usable(train, config, console)
    held_out = usable(held_out, config, console) if held_out else []
    return Rows(
        train[: config.max_train_samples],
        # Evaluation runs in the order of length, so that batches need little padding.
        sorted(held_out[: config.max_eval_samples], key=lambda row: row.duration or 0.0),
    )


def _manifest(path: Path | str | None, config: TrainConfig) -> list[Utterance]:
    source = path if path is not None else config.dataset_dir
    if source is None:  # the schema asks for one of the two
        raise DataError(_("Give the recordings with --train_file, or with --dataset_dir and --json_file."))
    dataset_dir = Path(config.dataset_dir) if config.dataset_dir else None
    json_file = config.json_file if path is None else None
    return load_manifest(source, dataset_dir=dataset_dir, json_file=json_file).utterances


def usable(rows: Sequence[Utterance], config: TrainConfig, console: Console) -> list[Utterance]:
    """Rows without those outside the length limits, which are named."""
    kept: list[Utterance] = []
    left_out: list[Utterance] = []
    longest = config.max_audio_len
    if isinstance(config.audio_context, float):
        longest = min(longest, config.audio_context)
    for row in rows:
        inside = config.min_audio_len <= (row.duration or 0.0) <= longest
        (kept if inside else left_out).append(row)
    if left_out:
        console.print(
            _("{count} of {total} recordings are left out: not between {least:g} and {most:g} seconds long.").format(
                count=len(left_out), total=len(rows), least=config.min_audio_len, most=longest
            ),
            style="yellow",
        )
        for row in left_out[:SHOWN]:
            console.print(
                _("  row {row}: {audio}, {seconds:.2f} s").format(
                    row=row.row, audio=row.audio, seconds=row.duration or 0.0
                ),
                highlight=False,
                soft_wrap=True,
            )
    if not kept:
        raise DataError(
            _(
                "No recording is between {least:g} and {most:g} seconds long. Cut longer ones, or check --max_audio_len."
            ).format(least=config.min_audio_len, most=longest)
        )
    return kept


def settle_languages(rows: Sequence[Utterance], given: str | None) -> list[Utterance]:
    """Rows with Whisper's code of their own language; with none where `given` (--language) speaks for all.

    Raises DataError naming the rows whose language Whisper does not know.
    """
    if given:
        return [replace(row, language=None) for row in rows]
    codes: dict[str | None, str | None] = {None: None}
    faults = []
    for row in rows:
        if row.language not in codes:
            try:
                codes[row.language] = language_code(row.language or "")
            except ValueError as error:
                codes[row.language] = None
                faults.append(
                    _("row {row}: language {language}: {reason}").format(
                        row=row.row, language=repr(row.language), reason=error
                    )
                )
    if faults:
        raise DataError("\n".join([*faults, _("Correct these rows, or give --language for all of them.")]))
    return [replace(row, language=codes[row.language]) for row in rows]


def guess_language(rows: Sequence[Utterance]) -> str:
    """ "zh" where at least half of the letters are Chinese characters, else "en"."""
    letters = [c for row in rows for c in row.text if c.isalpha()]
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    return "zh" if chinese * 2 >= max(len(letters), 1) else "en"


def single_language(rows: Sequence[Utterance], otherwise: str) -> str | None:
    """The language of all rows, where those that name none are in `otherwise`; None when there are several."""
    languages = {row.language or otherwise for row in rows}
    return languages.pop() if len(languages) == 1 else None


def rows_in_words(rows: Rows, language: str) -> str:
    """How many recordings there are to train and to measure on."""
    held_out, hours = len(rows.held_out), rows.hours
    if rows.stream and hours is None:
        return _("Recordings: streamed from {place}, {held_out} held out · language {language}").format(
            place=rows.stream.source.name, held_out=held_out, language=language
        )
    if rows.stream:
        return _(
            "Recordings: {train} streamed from {place} ({hours:.2f} h), {held_out} held out · language {language}"
        ).format(train=rows.count, place=rows.stream.source.name, hours=hours, held_out=held_out, language=language)
    return _("Recordings: {train} to train on ({hours:.2f} h), {held_out} held out · language {language}").format(
        train=rows.count, hours=hours, held_out=held_out, language=language
    )


def check_labels(rows: Sequence[Utterance], tokenizer: LabelTokenizer) -> None:
    """Raise one DataError for all rows whose text does not fit the decoder."""
    problems = []
    for row in rows:
        # A token is at least a byte, so only long texts need to be tokenised.
        timed = sum(len(segment.text.encode()) + 3 for segment in row.segments)
        if max(len(row.text.encode()), timed) + 8 > tokenizer.max_label_tokens:
            try:
                for timestamps in (False, True):
                    tokenizer.encode(row, timestamps=timestamps)
            except DataError as error:
                problems.append(str(error))
    if problems:
        more = [_("… and {count} more").format(count=len(problems) - 20)] if len(problems) > 20 else []
        raise DataError("\n".join(problems[:20] + more))


def fingerprint(rows: Sequence[Utterance]) -> str:
    """SHA-256 over texts, spans and durations: the same recordings in any order and any folder give the same."""
    keys = sorted(f"{Path(r.audio).name}|{r.start}|{r.end}|{r.duration}|{r.text}" for r in rows)
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
