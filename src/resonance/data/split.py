"""Recordings for training and recordings for evaluation, so that the evaluation is honest.

Membership depends on the seed, the texts and the file names only: sorting or moving the rows of a manifest changes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from pathlib import PurePath
from typing import Literal

from resonance.data.manifest import Utterance
from resonance.errors import ConfigError, DataError
from resonance.messages import _

SplitBy = Literal["sentence", "speaker", "within_sentence"]


def sentence_key(text: str) -> str:
    """What two texts share when they are the same sentence: letters, digits and symbols, without case and width.

    Punctuation and white space are dropped. Marks are kept: in Devanagari they are vowels.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(filter(_counts, folded))


def split(
    utterances: Sequence[Utterance], *, eval_fraction: float, by: SplitBy, seed: int
) -> tuple[list[Utterance], list[Utterance]]:
    """Training and evaluation rows, each in the manifest's order.

    `by` sentence: no sentence is on both sides. `by` speaker: no speaker is. `by` within_sentence: every sentence of
    the evaluation is in training too, in another recording. A group is never cut, so the evaluation has `eval_fraction`
    of the rows or less; it has one group at least. Raises DataError when there is too little to split.
    """
    if not 0 < eval_fraction < 1:
        raise ConfigError(
            [_("The share for evaluation must lie between 0 and 1, found {value}.").format(value=eval_fraction)]
        )
    if len(utterances) < 2:
        raise DataError(
            _(
                "{count} recordings cannot be split into training and evaluation. Record more, or give a separate "
                "list for evaluation."
            ).format(count=len(utterances))
        )
    wanted = min(max(1, round(len(utterances) * eval_fraction)), len(utterances) - 1)
    if by == "within_sentence":
        chosen = _takes(utterances, wanted, seed)
        in_eval = [_recording(utterance) in chosen for utterance in utterances]
    else:
        key = _speaker_groups(utterances) if by == "speaker" else _sentence_group
        groups = _whole_groups(utterances, key, wanted, seed, by)
        in_eval = [key(utterance) in groups for utterance in utterances]
    train = [utterance for utterance, held_out in zip(utterances, in_eval, strict=True) if not held_out]
    evaluation = [utterance for utterance, held_out in zip(utterances, in_eval, strict=True) if held_out]
    return train, evaluation


@functools.cache
def _counts(char: str) -> bool:
    return unicodedata.category(char)[0] not in "PZC"


def _sentence_group(utterance: Utterance) -> str:
    # Recordings of noise have no sentence in common: each is a group of its own.
    return sentence_key(utterance.text) or f"\0{PurePath(utterance.audio).name}"


def _speaker_groups(utterances: Sequence[Utterance]) -> Callable[[Utterance], str]:
    unnamed = [utterance.row for utterance in utterances if utterance.speaker is None]
    if unnamed:
        raise DataError(
            _(
                "{count} of {total} rows do not say who speaks (the first: row {row}). Add “speaker” to each, or split "
                "by sentence."
            ).format(count=len(unnamed), total=len(utterances), row=unnamed[0])
        )
    return lambda utterance: utterance.speaker or ""


def _whole_groups(
    utterances: Sequence[Utterance], key: Callable[[Utterance], str], wanted: int, seed: int, by: SplitBy
) -> set[str]:
    """Groups in an order drawn by the seed, as long as they fit into `wanted` rows; the smallest when none fits."""
    sizes: dict[str, int] = defaultdict(int)
    for utterance in utterances:
        sizes[key(utterance)] += 1
    if len(sizes) < 2:
        if by == "speaker":
            raise DataError(
                _(
                    "All {count} rows are of one speaker, so there is none to hold out. Split by sentence instead."
                ).format(count=len(utterances))
            )
        raise DataError(
            _(
                "All {count} rows have the same sentence, so there is none to hold out. Record other sentences, or split "
                "within sentences."
            ).format(count=len(utterances))
        )
    order = sorted(sizes, key=lambda group: _draw(seed, group))
    chosen: set[str] = set()
    rows = 0
    for group in order:
        if rows + sizes[group] <= wanted:
            chosen.add(group)
            rows += sizes[group]
    return chosen or {min(order, key=sizes.__getitem__)}


def _takes(utterances: Sequence[Utterance], wanted: int, seed: int) -> set[Hashable]:
    """Recordings to hold out: one of every sentence before a second of any, and one of each stays in training."""
    takes: dict[str, dict[Hashable, tuple[bytes, str]]] = defaultdict(dict)
    for utterance in utterances:
        # A recording listed twice is one take: its copy must not be trained on. The order is drawn by the name without
        # its folders, which differ between machines; they only decide between equal names.
        order = _draw(seed, f"{PurePath(utterance.audio).name}\0{utterance.start}"), utterance.audio
        takes[sentence_key(utterance.text)][_recording(utterance)] = order
    queue = []
    for sentence, recordings in takes.items():
        if sentence:
            ordered = sorted(recordings, key=recordings.__getitem__)
            queue += [(turn, _draw(seed, sentence), take) for turn, take in enumerate(ordered[:-1])]
    if not queue:
        raise DataError(
            _(
                "Every sentence was recorded only once, so none can be in training and in evaluation. Record sentences "
                "twice, or split by sentence."
            )
        )
    queue.sort(key=lambda entry: entry[:2])
    return {take for _turn, _order, take in queue[:wanted]}


def _recording(utterance: Utterance) -> Hashable:
    return utterance.audio, utterance.start, utterance.end


def _draw(seed: int, name: str) -> bytes:
    """A random-looking order that is the same on every machine, unlike hash()."""
    return hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
