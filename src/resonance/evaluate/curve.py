"""Accuracy by number of training recordings, for the screen, as JSON and as a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.table import Table

from resonance.data.textfile import write_text_atomic
from resonance.evaluate.charts import Curve, line_chart
from resonance.evaluate.metrics import Rate, compare
from resonance.evaluate.results import (
    EvaluationReport,
    Group,
    GroupName,
    change,
    group_name,
    interval,
    metric_name,
    percent,
)
from resonance.messages import _, language

LONGEST_WORD = 10  # characters, of a heading


@dataclass(frozen=True, slots=True)
class Point:
    """One training of the curve: on so many recordings, measured on the same held-out ones as all others."""

    recordings: int
    report: EvaluationReport

    @property
    def whole(self) -> Group:
        return self.report.groups[0]

    def group(self, name: GroupName) -> Group | None:
        return next((group for group in self.report.groups if group.name == name), None)


def advice(points: Sequence[Point]) -> str:
    """Whether the last recordings helped, which is what tells whether to record more."""
    if len(points) < 2:
        return _("One point makes no curve: give more numbers with --sizes, or more recordings.")
    before, last = points[-2], points[-1]
    difference = compare(before.whole.tuned, last.whole.tuned).exact_phrase_accuracy
    facts = _("From {before} to {last} recordings, phrases understood exactly changed by {change}.").format(
        before=before.recordings, last=last.recordings, change=change(difference).replace("\n", " ")
    )
    if not difference.certain:
        judged = _("That may be chance: test with more recordings to know whether recording more helps.")
    elif difference.value and difference.value > 0:
        judged = _("The last recordings helped, so more of them will probably help too.")
    else:
        judged = _("The last recordings made it worse: check them with `resonance data check` and listen to them.")
    return f"{facts} {judged}"


def format_table(points: Sequence[Point]) -> Table:
    """Rows of the curve for the screen: the base model first, as zero recordings."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), show_edge=False)
    rows = _cells(points)
    for heading, cells in zip(_headings(points), zip(*rows, strict=True), strict=True):
        # The headings go over several lines, so that 80 columns hold the numbers.
        longest = max(cell_len(line) for cell in cells for line in cell.split("\n"))
        table.add_column(heading, justify="right", overflow="fold", width=max(longest, LONGEST_WORD))
    for row in rows:
        table.add_row(*row)
    return table


def write_curve(folder: Path, title: str, points: Sequence[Point]) -> Path:
    """Write `curve.json` and `curve.html` and return the page's path. Raises DataError where they cannot be written."""
    write_text_atomic(folder / "curve.json", [json.dumps(curve_json(points), ensure_ascii=False, indent=1)])
    page = folder / "curve.html"
    write_text_atomic(page, [html_page(title, points)])
    return page


def curve_json(points: Sequence[Point]) -> dict[str, Any]:
    """{format, normalizer, main_metric, base_model, base, points: [{recordings, groups}]}; rates as in `report.json`."""

    def rates(scores: Any) -> dict[str, Any]:
        return {name: asdict(getattr(scores, name)) for name in ("exact_phrase_accuracy", "wer", "cer", "mer")}

    first = points[0]
    return {
        "format": 1,
        "normalizer": first.whole.tuned.normalizer,
        "main_metric": first.whole.tuned.main_metric,
        "base_model": first.report.base_model,
        "base": first.whole.base and rates(first.whole.base),
        "points": [
            {
                "recordings": point.recordings,
                "groups": {
                    group.name: {"utterances": len(group.tuned.utterances), **rates(group.tuned)}
                    for group in point.report.groups
                },
            }
            for point in points
        ],
    }


def html_page(title: str, points: Sequence[Point]) -> str:
    """The page as text; nothing in it is loaded from elsewhere."""
    base = points[0].whole.base
    whiskers = [(p.recordings, p.whole.tuned.exact_phrase_accuracy) for p in points]
    curves = [
        Curve(
            _("after"),
            "b",
            [(x, rate.value) for x, rate in whiskers if rate.value is not None],
            [(x, rate.low, rate.high) for x, rate in whiskers if rate.low is not None and rate.high is not None],
        )
    ]
    legend = f'<span class="key b">{escape(_("after"))}</span>'
    if base is not None and base.exact_phrase_accuracy.value is not None:
        level = base.exact_phrase_accuracy.value
        curves.insert(0, Curve(_("before"), "a", [(0, level), (points[-1].recordings, level)]))
        legend = f'<span class="key a">{escape(_("before"))}</span>{legend}'
    chart = line_chart(_("Understood exactly"), _("training recordings"), curves, percent=True)
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in _headings(points))
    rows = "".join(
        "<tr>" + "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells) + "</tr>"
        for cells in _cells(points)
    )
    tested = len(points[0].whole.tuned.utterances)
    note = _(
        "Each training was measured on the same {count} recordings, which none of them saw. 95 % intervals (Wilson, "
        "bootstrap). Normaliser: {normalizer}."
    ).format(count=tested, normalizer=points[0].whole.tuned.normalizer)
    body = (
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(advice(points))}</p></header>'
        f'<section><p class="legend">{legend}</p><figure>{chart}<figcaption>{escape(_("Understood exactly"))}</figcaption>'
        f"</figure></section><section><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        f'<p class="soft">{escape(note)}</p></section>'
    )
    template = resources.files("resonance.evaluate").joinpath("report.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return Template(template).substitute(lang=language(), title=escape(title), policy=policy, body=body, script="")


def _headings(points: Sequence[Point]) -> list[str]:
    return [
        _("training recordings"),
        _("Understood exactly"),
        metric_name(points[0].whole.tuned.main_metric),
        group_name("seen"),
        group_name("new"),
    ]


def _cells(points: Sequence[Point]) -> list[list[str]]:
    """One row of text for each row of the table."""

    def cell(rate: Rate | None) -> str:
        return "–" if rate is None else f"{percent(rate.value)}  {rate.count}/{rate.total}\n{interval(rate)}"

    rows = []
    base = points[0].whole.base
    if base is not None:
        rows.append([_("0 (before)"), cell(base.exact_phrase_accuracy), cell(base.main), "–", "–"])
    for point in points:
        seen, new = point.group("seen"), point.group("new")
        rows.append(
            [
                str(point.recordings),
                cell(point.whole.tuned.exact_phrase_accuracy),
                cell(point.whole.tuned.main),
                *(cell(part.tuned.exact_phrase_accuracy if part else None) for part in (seen, new)),
            ]
        )
    return rows
