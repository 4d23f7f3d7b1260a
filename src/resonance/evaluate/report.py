"""The evaluation as one HTML file: nothing to load from elsewhere, for a family as for an expert, on a phone and on paper."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from resonance.data.textfile import write_text_atomic
from resonance.evaluate.charts import Curve, IntervalRow, interval_chart, line_chart
from resonance.evaluate.metrics import Metric, UtteranceResult, align, main_metric
from resonance.evaluate.normalize import Unit
from resonance.evaluate.results import (
    EvaluationReport,
    Row,
    change,
    group_name,
    interval,
    lead_sentence,
    method_notes,
    metric_name,
    model_headings,
    percent,
    table_rows,
    verdict,
    worst_rows,
)
from resonance.messages import _, language
from resonance.units import SAMPLE_RATE, WINDOW_SECONDS

WORST_CLIPS = 10
MAX_WAV_BYTES = int(WINDOW_SECONDS * SAMPLE_RATE) * 2 + 1024  # 30 s of 16-bit mono and its header: 1 MB
MAX_TABLE_ROWS = 1000  # about 500 kB of page; the JSON file has all

# Sorts a table by the column whose heading is pressed: by `data-value` where a cell has one, else by its text.
SCRIPT = """
for (const heading of document.querySelectorAll("table.sortable thead th")) {
  heading.querySelector("button").addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    const rows = heading.closest("table").tBodies[0];
    const value = row => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent;
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    rows.append(...[...rows.rows].sort((a, b) =>
      (up ? 1 : -1) * value(a).localeCompare(value(b), document.documentElement.lang, {numeric: true})));
  });
}
"""


def write_report(path: Path, report: EvaluationReport) -> None:
    """Write the page to `path` in the reader's language. Raises DataError where it cannot be written."""
    write_text_atomic(path, [html_page(report)])


def html_page(report: EvaluationReport) -> str:
    """The page as text. Whatever comes from transcripts, file names and settings is escaped."""
    unit = report.groups[0].tuned.unit
    body = [
        _header(report),
        _charts(report),
        _scores(report),
        _worst(report.rows, unit),
        _training(report.events),
        _all_rows(report.rows, main_metric(unit)),
        _terms(),
        _facts(report),
    ]
    # Only the script above may run: not one that somebody typed into a transcript.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; media-src data:; script-src 'sha256-{digest}'"
    template = resources.files("resonance.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        lang=language(), title=escape(report.title), policy=policy, body="\n".join(filter(None, body)), script=SCRIPT
    )


def _header(report: EvaluationReport) -> str:
    whole, parts = report.groups[0], report.groups[1:]
    kind, sentence = verdict(whole)
    items = "".join(f"<li>{escape(lead_sentence(group))}</li>" for group in parts)
    models = (
        _("Before: {base}. After: {tuned}. Measured on {date}.")
        if report.base_model is not None
        else _("Model: {tuned}. Measured on {date}.")
    ).format(base=report.base_model, tuned=report.tuned_model, date=report.created[:10])
    return (
        f'<header><h1>{escape(report.title)}</h1><p class="lead">{escape(lead_sentence(whole))}</p>'
        + (f'<ul class="groups">{items}</ul>' if items else "")
        + f'<p class="verdict {kind}">{escape(sentence)}</p>'
        + f'<p class="soft">{escape(models)}</p></header>'
    )


def _charts(report: EvaluationReport) -> str:
    metric = report.groups[0].tuned.main_metric
    exact = [
        IntervalRow(
            _counted(group_name(g.name), len(g.tuned.utterances)),
            None if g.base is None else g.base.exact_phrase_accuracy,
            g.tuned.exact_phrase_accuracy,
        )
        for g in report.groups
    ]
    errors = [
        IntervalRow(row.label, None if g.base is None else g.base.main, g.tuned.main)
        for row, g in zip(exact, report.groups, strict=True)
    ]
    title, legend = (_("Result"), "") if report.base_model is None else (_("Before and after"), _legend())
    return (
        f"<section><h2>{escape(title)}</h2>{legend}"
        '<div class="grid-2">'
        + _figure(_("Understood exactly: further right is better"), interval_chart(_("Understood exactly"), exact))
        + _figure(
            _("{metric}: further left is better").format(metric=metric_name(metric)),
            interval_chart(metric_name(metric), errors),
        )
        + "</div></section>"
    )


def _scores(report: EvaluationReport) -> str:
    models = model_headings(report)
    headings = [*models, _("change")] if len(models) > 1 else models
    bodies = []
    for group in report.groups:
        title = _counted(group_name(group.name), len(group.tuned.utterances))
        lines = [f'<tr><th colspan="{1 + len(headings)}" scope="rowgroup">{escape(title)}</th></tr>']
        for name, rates, difference in table_rows(group):
            cells = "".join(
                f'<td class="number" data-label="{escape(label)}">{percent(rate.value)}'
                f"<small>{interval(rate)} {rate.count}/{rate.total}</small></td>"
                for label, rate in zip(models, rates, strict=True)
            )
            if len(models) > 1:
                moved, _newline, reach = escape(change(difference)).partition("\n") if difference else ("", "", "")
                moved += f"<small>{reach}</small>" if reach else ""
                cells += f'<td class="number" data-label="{escape(headings[-1])}">{moved}</td>'
            lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
        bodies.append(f'<tbody class="group">{"".join(lines)}</tbody>')
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in ("", *headings))
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in method_notes(report))
    return (
        f'<section><h2>{escape(_("All measures"))}</h2><div class="card"><table class="wide"><thead><tr>{head}</tr></thead>'
        f"{''.join(bodies)}</table></div><br>{notes}</section>"
    )


def _worst(rows: Sequence[Row], unit: Unit) -> str:
    positions = worst_rows(rows, main_metric(unit), WORST_CLIPS)
    heading = f"<section><h2>{escape(_('Where the model is furthest off'))}</h2>"
    if not positions:
        return f"{heading}<p>{escape(_('Nowhere: it made no mistake in these recordings.'))}</p></section>"
    explained = _(
        "Listen, and check that the text under “said” is what is said. Underlined: heard but not said. Struck out: said but "
        "not heard. Shown without punctuation and capitals, as it was compared."
    )
    return (
        f'{heading}<p class="soft">{escape(explained)}</p><div class="grid-2">'
        + "".join(_clip(rows[i], unit) for i in positions)
        + "</div></section>"
    )


def _clip(row: Row, unit: Unit) -> str:
    counts = row.tuned.counts(main_metric(unit))
    tags = [] if row.seen is None else [_("phrase also in training") if row.seen else _("new phrase")]
    tags += [row.speaker] if row.speaker else []
    tags += [_("errors: {errors}, length: {length}").format(errors=counts.errors, length=counts.reference_length)]
    tags += [_("stuck in a loop")] if row.tuned.loop else []
    audio = ""
    if row.wav is not None and len(row.wav) <= MAX_WAV_BYTES:
        data = base64.b64encode(row.wav).decode()
        label = escape(_("Recording: {text}").format(text=row.reference))
        audio = f'<audio controls preload="none" aria-label="{label}" src="data:audio/wav;base64,{data}"></audio>'
    elif row.wav is not None:
        audio = f'<p class="soft">{escape(_("Too long to be put into this page."))}</p>'
    texts = [(_("said"), escape(row.reference) or _nothing())]
    if row.base is not None:
        texts += [(_("before"), _marked(row.base, unit)), (_("after"), _marked(row.tuned, unit))]
    else:
        texts.append((_("result"), _marked(row.tuned, unit)))
    return (
        '<article class="card clip">'
        + " ".join(f'<span class="pill">{escape(tag)}</span>' for tag in tags)
        + f"{audio}<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{text}</dd>' for name, text in texts)}</dl>"
        + f'<p class="file">{escape(Path(row.audio).name)}</p></article>'
    )


def _marked(result: UtteranceResult, unit: Unit) -> str:
    """The hypothesis with what is wrong in it underlined and what is missing struck out."""
    gap = "" if unit == "char" else " "
    parts = []
    for kind, reference, hypothesis in align([result.reference], [result.hypothesis], unit)[0]:
        said, heard = escape(gap.join(reference)), escape(gap.join(hypothesis))
        if kind == "equal":
            parts.append(heard)
        else:
            parts += [f"<del>{said}</del>"] if said else []
            parts += [f"<ins>{heard}</ins>"] if heard else []
    return gap.join(parts) or _nothing()


def _training(events: Sequence[Mapping[str, Any]]) -> str:
    errors = [
        Curve(metric_name(metric), "b", points)
        for metric in ("cer", "wer", "mer")
        if (points := _points(events, f"eval_{metric}"))
    ]
    loss, held_out = _points(events, "loss"), _points(events, "eval_loss")
    if not loss and not held_out and not errors:
        return ""
    step = _("training step")
    figures = []
    if loss or held_out:
        curves = [Curve(_("in training"), "a", loss), Curve(_("on held-out recordings"), "b", held_out)]
        figures.append(
            _figure(_("Loss"), line_chart(_("Loss"), step, curves), _legend([c for c in curves if c.points]))
        )
    figures += [_figure(c.name, line_chart(c.name, step, [c], percent=True)) for c in errors]
    explained = _(
        "Both should fall and level off. Where the loss on held-out recordings rises again while the other still falls, "
        "the model has begun to learn the recordings by heart: fewer steps or more recordings help."
    )
    return (
        f'<section><h2>{escape(_("Training"))}</h2><p class="soft">{escape(explained)}</p>'
        f'<div class="grid-2">{"".join(figures)}</div></section>'
    )


def _points(events: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(float(e["step"]), float(e[key])) for e in events if isinstance(e.get(key), (int, float)) and "step" in e]


def _all_rows(rows: Sequence[Row], metric: Metric) -> str:
    worst = worst_rows(rows, metric, len(rows))
    order = (worst + sorted(set(range(len(rows))) - set(worst)))[:MAX_TABLE_ROWS]
    if any(row.base for row in rows):
        outputs, counted = [_("before"), _("after")], [_("errors before"), _("errors after")]
    else:
        outputs, counted = [_("result")], [_("errors")]
    headings = [_("said"), *outputs, *counted, _("phrase"), _("speaker")]
    lines = []
    for i in order:
        row = rows[i]
        texts, numbers = [escape(row.reference) or _nothing()], []
        for text, result in ((row.base_text, row.base), (row.tuned_text, row.tuned)):
            if text is None or result is None:
                continue
            style, mark = ("right", "✓") if result.exact else ("wrong", "✗")
            texts.append(f'<span class="{style}">{mark}</span> {escape(text) or _nothing()}')
            numbers.append(result.counts(metric))
        cells = [f'<td data-label="{escape(name)}">{text}</td>' for name, text in zip(headings, texts, strict=False)]
        for name, counts in zip(counted, numbers, strict=True):
            cells.append(
                f'<td class="number" data-label="{escape(name)}" data-value="{counts.errors}">'
                f"{counts.errors}/{counts.reference_length}</td>"
            )
        kind = "" if row.seen is None else _("trained") if row.seen else _("new")
        for name, text in zip(headings[-2:], (kind, row.speaker or ""), strict=True):
            cells.append(f'<td data-label="{escape(name)}">{escape(text)}</td>')
        lines.append(f'<tr title="{escape(Path(row.audio).name)}">{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in headings)
    note = _("Errors and lengths are those of “{metric}”. Press a heading to sort.").format(metric=metric_name(metric))
    if len(order) < len(rows):
        note += " " + _("The worst {shown} of {total} are shown; the JSON file has all.").format(
            shown=len(order), total=len(rows)
        )
    return (
        f'<section><h2>{escape(_("Every recording"))}</h2><p class="soft">{escape(note)}</p><div class="card scroll">'
        f'<table class="wide sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></section>'
    )


def _terms() -> str:
    terms = (
        (
            _("Understood exactly"),
            _(
                "The text is the phrase, word for word; capitals, punctuation and the kind of Chinese characters do not count."
            ),
        ),
        (
            _("Word, character and mixed errors"),
            _(
                "Wrong, missing and added words (characters), divided by the number that were said. Can pass 100% when the "
                "model adds much. Mixed counts each Chinese character and each Latin word as one."
            ),
        ),
        (
            _("Stuck in a loop"),
            _(
                "The model repeated a word or phrase at least four times in a row, or a text that long-windedly says the "
                "same, and the person did not."
            ),
        ),
        (
            _("95 % interval"),
            _(
                "Other recordings of the same person would give other numbers. Of such intervals, 95 in 100 hold the number "
                "that very many recordings would give. Few recordings make it wide."
            ),
        ),
        (
            _("Phrases also recorded for training, new phrases"),
            _(
                "No recording here was used for training. But a phrase may have been recorded twice, once for training: "
                "such phrases are easier than new ones."
            ),
        ),
    )
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in terms)
    return f'<section><h2>{escape(_("What the words mean"))}</h2><dl class="terms">{items}</dl></section>'


def _facts(report: EvaluationReport) -> str:
    parts = []
    for title, values in ((_("Settings"), report.settings), (_("Versions"), report.versions)):
        lines = "".join(
            f'<tr><th scope="row">{escape(str(name))}</th><td>{escape(str(value))}</td></tr>'
            for name, value in values.items()
        )
        if lines:
            parts.append(f"<details><summary>{escape(title)}</summary><table>{lines}</table></details>")
    return f"<section><h2>{escape(_('How it was made'))}</h2>{''.join(parts)}</section>" if parts else ""


def _figure(caption: str, drawing: str, legend: str = "") -> str:
    return f"<figure><h3>{escape(caption)}</h3>{legend}{drawing}</figure>"


def _legend(curves: Sequence[Curve] = ()) -> str:
    keys = [(c.style, c.name) for c in curves] or [("a", _("before")), ("b", _("after"))]
    return (
        '<p class="legend">'
        + "".join(f'<span class="key {style}">{escape(name)}</span>' for style, name in keys)
        + "</p>"
    )


def _counted(name: str, number: int) -> str:
    return _("{name} ({number})").format(name=name, number=number)


def _nothing() -> str:
    return f"<em>{escape(_('nothing'))}</em>"
