"""A tuned model beside its base, or a stock model alone, as data, as plain sentences, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group as Lines
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from resonance.evaluate.metrics import (
    BOOTSTRAP_SAMPLES,
    Comparison,
    Difference,
    ErrorCounts,
    Metric,
    Rate,
    Scores,
    UtteranceResult,
    compare,
    main_metric,
    summarize,
)
from resonance.evaluate.normalize import Normalizer, Unit
from resonance.messages import _

GroupName = Literal["all", "seen", "new"]
FEW_RECORDINGS = 20  # fewer, and the bootstrap's intervals are too narrow: see `metrics`


@dataclass(frozen=True, slots=True)
class Row:
    """One recording that was kept out of training, transcribed by both models.

    Texts are as written; `base` and `tuned` hold what was compared; of a stock model, which has no base, only `tuned`.
    `seen` says that another recording of the same phrase was in training, None that it is not known. `wav` is a whole WAV
    file to put into the page, wanted for the rows of `worst_rows`.
    """

    audio: str
    reference: str
    base_text: str | None
    tuned_text: str
    base: UtteranceResult | None
    tuned: UtteranceResult
    seen: bool | None
    speaker: str | None = None
    wav: bytes | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Both models on the same part of the recordings; without `base` and `difference`, a stock model alone."""

    name: GroupName
    base: Scores | None
    tuned: Scores
    difference: Comparison | None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """What the screen, the JSON file and the page show.

    `groups` comes from `group_rows` and begins with "all". `events` are the rows of `events.jsonl`, empty where the run is
    not at hand. `created` is an ISO date and time. `notes` are sentences on where the recordings come from.
    """

    title: str
    base_model: str | None  # None where a stock model was measured alone
    tuned_model: str
    language: str | None
    created: str
    groups: tuple[Group, ...]
    rows: tuple[Row, ...]
    events: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()


def group_rows(
    rows: Sequence[Row], normalizer: Normalizer, seed: int = 0, samples: int = BOOTSTRAP_SAMPLES
) -> tuple[Group, ...]:
    """Scores of all rows, and of seen and new phrases apart where there are both."""
    parts: list[tuple[GroupName, list[Row]]] = [("all", list(rows))]
    seen, new = [row for row in rows if row.seen], [row for row in rows if row.seen is False]
    if seen and new:
        parts += [("seen", seen), ("new", new)]
    groups = []
    for name, members in parts:
        tuned = summarize([row.tuned for row in members], normalizer, seed, samples)
        before = [row.base for row in members if row.base is not None]
        if before:
            base = summarize(before, normalizer, seed, samples)
            groups.append(Group(name, base, tuned, compare(base, tuned, seed, samples)))
        else:
            groups.append(Group(name, None, tuned, None))
    return tuple(groups)


def worst_rows(rows: Sequence[Row], metric: Metric, limit: int) -> list[int]:
    """Positions of the rows where the tuned model made most errors for the length of the phrase; none without errors."""

    def badness(i: int) -> tuple[float, int]:
        counts = rows[i].tuned.counts(metric)
        return counts.errors / max(counts.reference_length, 1), counts.errors

    return sorted((i for i in range(len(rows)) if rows[i].tuned.counts(metric).errors), key=badness, reverse=True)[
        :limit
    ]


def shown_metrics(unit: Unit) -> tuple[Metric, ...]:
    """Error rates worth showing, the main one first. JSON has all three."""
    others: dict[Unit, tuple[Metric, ...]] = {"word": ("cer",), "char": ("mer",), "mixed": ("cer", "wer")}
    return (main_metric(unit), *others[unit])


def metric_name(metric: Metric | Literal["exact_phrase_accuracy", "repetition_rate"]) -> str:
    return {
        "wer": _("Word errors (WER)"),
        "cer": _("Character errors (CER)"),
        "mer": _("Mixed errors (MER)"),
        "exact_phrase_accuracy": _("Understood exactly"),
        "repetition_rate": _("Stuck in a loop"),
    }[metric]


def group_name(name: GroupName) -> str:
    return {
        "all": _("All recordings"),
        "seen": _("Phrases also recorded for training"),
        "new": _("New phrases"),
    }[name]


def lead_sentence(group: Group) -> str:
    """How many recordings were understood before and after, in words."""
    after = group.tuned.exact_phrase_accuracy
    if group.base is None:
        return _("Recordings: {total}. Understood exactly: {count}.").format(total=after.total, count=after.count)
    before = group.base.exact_phrase_accuracy
    text = {
        "all": _(
            "Recordings that were kept out of training: {total}. Understood exactly before: {before}, after: {after}."
        )
        if after.total == 1
        else _(
            "Of {total} recordings that were kept out of training, {before} were understood exactly before, {after} after."
        ),
        "seen": _(
            "Phrases that were also recorded for training: {before} of {total} before, {after} of {total} after."
        ),
        "new": _(
            "Phrases that were never recorded for training: {before} of {total} before, {after} of {total} after."
        ),
    }[group.name]
    return text.format(total=after.total, before=before.count, after=after.count)


def verdict(group: Group) -> tuple[Literal["better", "worse", "unclear", "alone"], str]:
    """Whether the tuned model is better, in one word for programs and one sentence for people.

    Exact phrases decide; where they do not, the main error rate.
    """
    if group.difference is None:
        return "alone", _("This model was not fine-tuned here, so there is no model to compare it with.")
    exact, main = group.difference.exact_phrase_accuracy, group.difference.main
    if exact.certain and exact.value is not None:
        better = exact.value > 0
    elif main.certain and main.value is not None:
        better = main.value < 0
    else:
        return "unclear", _(
            "The difference may be chance. Test with more recordings before you rely on it: at least six must change for "
            "the better, and none for the worse, to tell."
        )
    if better:
        return "better", _("The tuned model is better, by more than chance explains.")
    return "worse", _(
        "The tuned model is worse, by more than chance explains. Keep using the base model, and listen to the worst "
        "recordings in the report: a wrong text in the training data is a common cause."
    )


def method_notes(report: EvaluationReport) -> list[str]:
    """How the numbers were made, for whoever compares them with others."""
    scores = report.groups[0].tuned
    notes = [
        _("Texts were compared after the normaliser {name}.").format(name=scores.normalizer),
        _(
            "In brackets: 95 % intervals. Shares of recordings: Wilson; error rates: bootstrap over recordings; "
            "differences: paired, Newcombe and bootstrap."
        ),
    ]
    notes += report.notes
    if len(scores.utterances) < FEW_RECORDINGS:
        notes.append(
            _(
                "With fewer than {number} recordings the intervals of error rates are narrower than they should be."
            ).format(number=FEW_RECORDINGS)
        )
    return notes


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def interval(rate: Rate) -> str:
    """ "(12.0–31.5%)", or nothing where the data cannot tell."""
    return "" if rate.low is None or rate.high is None else f"({100 * rate.low:.1f}–{100 * rate.high:.1f}%)"


def change(difference: Difference) -> str:
    """A difference in percentage points, its interval in a second line."""
    if difference.value is None:
        return "–"
    text = _("{value:+.1f} points").format(value=100 * difference.value)
    if difference.low is None or difference.high is None:
        return text
    return f"{text}\n({100 * difference.low:+.1f} … {100 * difference.high:+.1f})"


def table_rows(group: Group) -> list[tuple[str, list[Rate], Difference | None]]:
    """(measure, one rate for each of `model_headings`, difference where one was computed) for what is worth showing."""
    differences = {}
    if group.difference is not None:
        differences = {
            "exact_phrase_accuracy": group.difference.exact_phrase_accuracy,
            group.difference.main_metric: group.difference.main,
        }
    models = [scores for scores in (group.base, group.tuned) if scores is not None]
    measures: list[Metric | Literal["exact_phrase_accuracy", "repetition_rate"]] = [
        "exact_phrase_accuracy",
        *shown_metrics(group.tuned.unit),
        "repetition_rate",
    ]
    return [
        (metric_name(name), [getattr(scores, name) for scores in models], differences.get(name)) for name in measures
    ]


def model_headings(report: EvaluationReport) -> list[str]:
    """What the columns of the models are called."""
    return [_("result")] if report.base_model is None else [_("before"), _("after")]


def format_table(report: EvaluationReport) -> RenderableType:
    """The models side by side for the screen, a table for each group: the numbers of the page."""
    headings = model_headings(report)
    compared = len(headings) > 1
    parts: list[RenderableType] = []
    for group in report.groups:
        title = f"{group_name(group.name)} · {len(group.tuned.utterances)}"
        table = Table(title=Text(title, style="bold"), title_justify="left", show_lines=True)
        table.add_column("")
        for heading in [*headings, *([_("change")] if compared else [])]:
            table.add_column(heading, justify="right", no_wrap=True)
        for name, rates, difference in table_rows(group):
            cells = [Text(f"{percent(r.value)}  {r.count}/{r.total}\n{interval(r)}") for r in rates]
            if compared:
                cells.append(Text(change(difference).replace(" (", "\n(") if difference else ""))
            table.add_row(Text(name), *cells)
        parts.append(table)
    return Lines(*parts, Text("\n".join(method_notes(report)), style="dim"))


def report_json(report: EvaluationReport) -> dict[str, Any]:
    """The report as JSON values, without audio. Keys are stable; new ones may be added.

    format              1
    title, created, base_model, tuned_model, language, normalizer, main_metric
    verdict             better | worse | unclear | alone (a stock model: base and difference are None everywhere)
    notes               how the numbers were made, in sentences
    groups              all, seen, new → utterances; base and tuned → wer, cer, mer, exact_phrase_accuracy, repetition_rate,
                        each {value, low, high, count, total, method}; difference → main and exact_phrase_accuracy, each
                        {value, low, high, changed, method}. Rates are 0 to 1 (error rates may pass 1), None is unknown.
    rows                audio, speaker, seen, reference; base and tuned → text, normalized, exact, loop, and wer, cer, mer →
                        {substitutions, deletions, insertions, reference_length}
    settings, versions  as given
    """
    rates = ("wer", "cer", "mer", "exact_phrase_accuracy", "repetition_rate")
    scores = report.groups[0].tuned
    return {
        "format": 1,
        "title": report.title,
        "created": report.created,
        "base_model": report.base_model,
        "tuned_model": report.tuned_model,
        "language": report.language,
        "normalizer": scores.normalizer,
        "main_metric": scores.main_metric,
        "verdict": verdict(report.groups[0])[0],
        "notes": method_notes(report),
        "groups": {
            group.name: {
                "utterances": len(group.tuned.utterances),
                "base": group.base and {name: asdict(getattr(group.base, name)) for name in rates},
                "tuned": {name: asdict(getattr(group.tuned, name)) for name in rates},
                "difference": group.difference
                and {
                    "main": asdict(group.difference.main),
                    "exact_phrase_accuracy": asdict(group.difference.exact_phrase_accuracy),
                },
            }
            for group in report.groups
        },
        "rows": [
            {
                "audio": row.audio,
                "speaker": row.speaker,
                "seen": row.seen,
                "reference": row.reference,
                "base": None if row.base is None else _utterance_json(row.base_text or "", row.base),
                "tuned": _utterance_json(row.tuned_text, row.tuned),
            }
            for row in report.rows
        ],
        "settings": json.loads(json.dumps(dict(report.settings), default=str)),
        "versions": dict(report.versions),
    }


def _utterance_json(text: str, result: UtteranceResult) -> dict[str, Any]:
    counts: dict[str, ErrorCounts] = {"wer": result.words, "cer": result.characters, "mer": result.mixed}
    return {
        "text": text,
        "normalized": result.hypothesis,
        "exact": result.exact,
        "loop": result.loop,
        **{name: asdict(count) for name, count in counts.items()},
    }
