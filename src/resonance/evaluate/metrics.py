"""Error rates from pairs of texts, with their uncertainty. No model, no audio: pure functions.

What is reported, and how:

    wer, cer, mer            substitutions + deletions + insertions over the length of the references, summed over all
                             utterances; in words, in characters without spaces, or in mixed units: each character of a
                             script without spaces is one, each other word or number is one
    exact_phrase_accuracy    share of utterances whose normalised text is the reference's, spaces between units aside
    repetition_rate          share of utterances where the model got stuck in a loop, see `has_loop`

An utterance where nothing is said has an empty reference: what the model made up counts as insertions.

Intervals are at 95 %. Rates of errors: percentile bootstrap over utterances, since errors come in bunches. In a
simulation it held the true rate in 95 % of the trials with 100 utterances, 94 % with 20, 88 % with 10 and 77 % with 3: it
is too narrow below about 20. Shares of utterances: Wilson's interval, honest for few utterances and for none or all.
Between two models on the same utterances: paired bootstrap, and for shares Newcombe's interval for paired proportions
(1998, method 10).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import jiwer
import numpy as np

from resonance.errors import DataError
from resonance.evaluate.normalize import UNSPACED_SCRIPTS, Normalizer, Unit, normalizer_for
from resonance.messages import _

Method = Literal["bootstrap", "wilson", "newcombe", "none"]
Metric = Literal["wer", "cer", "mer"]

Z_95 = 1.959963984540054  # standard deviations on each side of 95 % of a normal distribution
MIN_CHANGED = 6  # the fewest changes, all one way, that a sign test calls more than chance: 2 * 0.5**6 < 0.05
BOOTSTRAP_SAMPLES = 1000
BOOTSTRAP_CHUNK = 1 << 22  # drawn indices at once: 32 MiB of int64
MIN_LOOP_REPEATS = 4
MAX_LOOP_UNITS = 20  # longer loops compress
MAX_COMPRESSION_RATIO = 2.4  # openai/whisper's threshold
COMPRESSION_PIECE_BYTES = 1000  # about one 30 s window of fast speech; whole chapters compress above 2.4 when right
MIN_COMPRESSION_BYTES = 100  # below, zlib's overhead hides any loop


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """How a hypothesis differs from its reference, in units of one kind."""

    substitutions: int
    deletions: int
    insertions: int
    reference_length: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions


@dataclass(frozen=True, slots=True)
class UtteranceResult:
    """One utterance, scored. `reference` and `hypothesis` are the normalised texts that were compared."""

    reference: str
    hypothesis: str
    words: ErrorCounts
    characters: ErrorCounts
    mixed: ErrorCounts
    exact: bool
    loop: bool

    def counts(self, metric: Metric) -> ErrorCounts:
        return {"wer": self.words, "cer": self.characters, "mer": self.mixed}[metric]


@dataclass(frozen=True, slots=True)
class Rate:
    """`count / total` with its 95 % interval.

    `count` is errors for error rates, utterances for shares. `value` is None where `total` is 0. `low` and `high` are
    None where the data cannot tell: fewer than two utterances with a reference for the bootstrap.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    total: int
    method: Method


@dataclass(frozen=True, slots=True)
class Scores:
    """All metrics of one model on one set of utterances."""

    normalizer: str
    unit: Unit
    wer: Rate
    cer: Rate
    mer: Rate
    exact_phrase_accuracy: Rate
    repetition_rate: Rate
    utterances: tuple[UtteranceResult, ...] = field(repr=False)

    @property
    def main_metric(self) -> Metric:
        return main_metric(self.unit)

    @property
    def main(self) -> Rate:
        """The error rate that this language is judged by."""
        rate: Rate = getattr(self, self.main_metric)
        return rate


@dataclass(frozen=True, slots=True)
class Difference:
    """Tuned minus base, with its 95 % interval. Negative is better for error rates, positive for accuracy.

    `changed` is the number of utterances that count differently for the two models.
    """

    value: float | None
    low: float | None
    high: float | None
    changed: int
    method: Method

    @property
    def certain(self) -> bool:
        """Whether this is more than chance: the interval leaves out zero, and it rests on more than a few utterances."""
        if self.changed < MIN_CHANGED:
            return False
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A tuned model against its base on the same utterances."""

    main_metric: Metric
    main: Difference
    exact_phrase_accuracy: Difference


def score(
    pairs: Sequence[tuple[str, str]],
    language: str | None,
    seed: int = 0,
    spellings: Mapping[str, str] | None = None,
) -> Scores:
    """All metrics of `pairs` of (reference, hypothesis), normalised for `language`. See `normalizer_for`."""
    normalizer = normalizer_for(language, spellings)
    return summarize(measure(pairs, normalizer), normalizer, seed)


def main_metric(unit: Unit) -> Metric:
    """The error rate that a language is judged by: `main_metric(normalizer_for(language).unit)`."""
    metrics: dict[Unit, Metric] = {"word": "wer", "char": "cer", "mixed": "mer"}
    return metrics[unit]


def measure(pairs: Sequence[tuple[str, str]], normalizer: Normalizer) -> list[UtteranceResult]:
    """Each pair of (reference, hypothesis), normalised and scored."""
    references = [normalizer.apply(reference) for reference, _hypothesis in pairs]
    hypotheses = [normalizer.apply(hypothesis) for _reference, hypothesis in pairs]
    words = error_counts(references, hypotheses, "word")
    characters = error_counts(references, hypotheses, "char")
    mixed = error_counts(references, hypotheses, "mixed")
    by_unit = {"word": words, "char": characters, "mixed": mixed}
    return [
        UtteranceResult(
            reference=references[i],
            hypothesis=hypotheses[i],
            words=words[i],
            characters=characters[i],
            mixed=mixed[i],
            exact=by_unit[normalizer.unit][i].errors == 0,
            # A person who says "no no no no" is not a loop.
            loop=has_loop(hypothesis) and not has_loop(reference),
        )
        for i, (reference, hypothesis) in enumerate(pairs)
    ]


def summarize(
    utterances: Sequence[UtteranceResult], normalizer: Normalizer, seed: int = 0, samples: int = BOOTSTRAP_SAMPLES
) -> Scores:
    """Scores of utterances that `measure` counted with `normalizer`; of a part of them for the scores of a group."""
    return Scores(
        normalizer=normalizer.name,
        unit=normalizer.unit,
        wer=_error_rate([u.words for u in utterances], seed, samples),
        cer=_error_rate([u.characters for u in utterances], seed, samples),
        mer=_error_rate([u.mixed for u in utterances], seed, samples),
        exact_phrase_accuracy=share(sum(u.exact for u in utterances), len(utterances)),
        repetition_rate=share(sum(u.loop for u in utterances), len(utterances)),
        utterances=tuple(utterances),
    )


def compare(base: Scores, tuned: Scores, seed: int = 0, samples: int = BOOTSTRAP_SAMPLES) -> Comparison:
    """How much the tuned model differs from its base. Both must be scores of the same utterances in the same order.

    Raises DataError where they are not.
    """
    if [u.reference for u in base.utterances] != [u.reference for u in tuned.utterances]:
        raise DataError(
            _(
                "The two models were not scored on the same recordings ({base} and {tuned}). "
                "Score both on the same list, in the same order."
            ).format(base=len(base.utterances), tuned=len(tuned.utterances))
        )
    metric = tuned.main_metric
    return Comparison(
        main_metric=metric,
        main=_paired_bootstrap(
            [u.counts(metric) for u in base.utterances], [u.counts(metric) for u in tuned.utterances], seed, samples
        ),
        exact_phrase_accuracy=_paired_shares([u.exact for u in base.utterances], [u.exact for u in tuned.utterances]),
    )


def split_units(text: str, unit: Unit) -> list[str]:
    """A normalised text as the units that errors are counted in."""
    if unit == "word":
        return text.split()
    if unit == "char":
        return list("".join(text.split()))
    return re.findall(f"[{UNSPACED_SCRIPTS}]|[^\\s{UNSPACED_SCRIPTS}]+", text)


def align(
    references: Sequence[str], hypotheses: Sequence[str], unit: Unit
) -> list[list[tuple[str, list[str], list[str]]]]:
    """For each pair of normalised texts its steps: ("equal" | "substitute" | "delete" | "insert", reference units,
    hypothesis units), in order."""
    output = jiwer.process_words(
        list(references), list(hypotheses), *(lambda texts: [split_units(text, unit) for text in texts],) * 2
    )
    return [
        [
            (
                step.type,
                reference[step.ref_start_idx : step.ref_end_idx],
                hypothesis[step.hyp_start_idx : step.hyp_end_idx],
            )
            for step in steps
        ]
        for reference, hypothesis, steps in zip(output.references, output.hypotheses, output.alignments, strict=True)
    ]


def error_counts(references: Sequence[str], hypotheses: Sequence[str], unit: Unit) -> list[ErrorCounts]:
    """Errors of each normalised hypothesis against its normalised reference."""
    counts = []
    for steps in align(references, hypotheses, unit):
        taken = {"equal": 0, "substitute": 0, "delete": 0, "insert": 0}
        for kind, reference, hypothesis in steps:
            taken[kind] += max(len(reference), len(hypothesis))
        counts.append(
            ErrorCounts(
                substitutions=taken["substitute"],
                deletions=taken["delete"],
                insertions=taken["insert"],
                reference_length=taken["equal"] + taken["substitute"] + taken["delete"],
            )
        )
    return counts


def has_loop(text: str) -> bool:
    """Whether a transcript repeats itself as a model does that got stuck.

    Either 1 to 20 words (characters in scripts without spaces) come at least four times in a row, or a piece of about
    one 30 s window compresses by more than 2.4, which also finds loops with small changes. Takes the text before
    normalisation: Whisper's English normaliser joins "one one one one" to one number.
    """
    units = re.findall(f"[{UNSPACED_SCRIPTS}]|[^\\W{UNSPACED_SCRIPTS}]+", text.lower())
    for length in range(1, min(MAX_LOOP_UNITS, len(units) // MIN_LOOP_REPEATS) + 1):
        same = 0
        for earlier, later in zip(units, units[length:], strict=False):
            same = same + 1 if earlier == later else 0
            if same == length * (MIN_LOOP_REPEATS - 1):
                return True
    encoded = text.encode("utf-8", "replace")
    pieces = (encoded[i : i + COMPRESSION_PIECE_BYTES] for i in range(0, len(encoded), COMPRESSION_PIECE_BYTES))
    return any(
        len(piece) >= MIN_COMPRESSION_BYTES and len(piece) / len(zlib.compress(piece)) > MAX_COMPRESSION_RATIO
        for piece in pieces
    )


def bootstrap_interval(
    numerators: Sequence[float], denominators: Sequence[float], samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """95 % percentile interval of sum(numerators) / sum(denominators) over utterances drawn with replacement.

    None where fewer than two denominators are above zero: nothing to draw from.
    """
    if sum(d > 0 for d in denominators) < 2:
        return None
    values = np.array([numerators, denominators], dtype=np.float64)  # [2, utterances]
    random = np.random.default_rng(seed)
    rows = max(1, BOOTSTRAP_CHUNK // values.shape[1])
    sums = np.concatenate(  # [2, samples]
        [
            values[:, random.integers(values.shape[1], size=(min(rows, samples - done), values.shape[1]))].sum(axis=2)
            for done in range(0, samples, rows)
        ],
        axis=1,
    )
    drawn = sums[:, sums[1] > 0]  # a draw of silent utterances alone has no rate
    low, high = np.percentile(drawn[0] / drawn[1], [2.5, 97.5])
    return float(low), float(high)


def share(count: int, total: int) -> Rate:
    """A share of utterances with Wilson's interval."""
    if total == 0:
        return Rate(None, None, None, 0, 0, "none")
    low, high = _wilson(count, total)
    return Rate(count / total, low, high, count, total, "wilson")


def _error_rate(counts: Sequence[ErrorCounts], seed: int, samples: int) -> Rate:
    errors, length = sum(c.errors for c in counts), sum(c.reference_length for c in counts)
    interval = bootstrap_interval([c.errors for c in counts], [c.reference_length for c in counts], samples, seed)
    low, high = interval or (None, None)
    return Rate(errors / length if length else None, low, high, errors, length, "bootstrap" if interval else "none")


def _paired_bootstrap(base: Sequence[ErrorCounts], tuned: Sequence[ErrorCounts], seed: int, samples: int) -> Difference:
    changes = [after.errors - before.errors for before, after in zip(base, tuned, strict=True)]
    lengths = [c.reference_length for c in base]
    interval = bootstrap_interval(changes, lengths, samples, seed)
    low, high = interval or (None, None)
    return Difference(
        value=sum(changes) / sum(lengths) if sum(lengths) else None,
        low=low,
        high=high,
        changed=sum(change != 0 for change in changes),
        method="bootstrap" if interval else "none",
    )


def _paired_shares(base: Sequence[bool], tuned: Sequence[bool]) -> Difference:
    n = len(base)
    if n == 0:
        return Difference(None, None, None, 0, "none")
    both = sum(b and t for b, t in zip(base, tuned, strict=True))
    before, after = sum(base), sum(tuned)
    neither = n - before - after + both
    # Correlation of the two outcomes, with Newcombe's continuity correction.
    product = both * neither - (before - both) * (after - both)
    margins = before * (n - before) * after * (n - after)
    phi = (max(product - n / 2, 0) if product > 0 else product) / math.sqrt(margins) if margins else 0.0
    (low_before, high_before), (low_after, high_after) = _wilson(before, n), _wilson(after, n)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    value = (after - before) / n
    return Difference(
        value=value,
        low=value - reach(after / n - low_after, high_before - before / n),
        high=value + reach(high_after - after / n, before / n - low_before),
        changed=before + after - 2 * both,
        method="newcombe",
    )


def _wilson(count: int, total: int) -> tuple[float, float]:
    p, z2 = count / total, Z_95**2
    middle = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return max(middle - half, 0.0), min(middle + half, 1.0)
