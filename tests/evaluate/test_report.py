"""The report as a reader gets it: page, table and JSON."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from resonance.errors import DataError
from resonance.evaluate.metrics import measure
from resonance.evaluate.normalize import normalizer_for
from resonance.evaluate.report import MAX_WAV_BYTES, WORST_CLIPS, html_page, write_report
from resonance.evaluate.results import (
    EvaluationReport,
    Row,
    format_table,
    group_rows,
    lead_sentence,
    report_json,
    verdict,
    worst_rows,
)

Texts = tuple[str, str, str]  # reference, base, tuned


def make_report(texts: list[Texts], seen: int = 0, language: str = "en", **changes: Any) -> EvaluationReport:
    """A report over `texts`, of which the first `seen` are phrases that were also in training."""
    normalizer = normalizer_for(language)
    base = measure([(reference, text) for reference, text, _tuned in texts], normalizer)
    tuned = measure([(reference, text) for reference, _base, text in texts], normalizer)
    rows = tuple(
        Row(f"/home/me/{i}.wav", *texts[i], base[i], tuned[i], seen=i < seen, wav=b"RIFF" + bytes([i]))
        for i in range(len(texts))
    )
    report = EvaluationReport(
        title="Test",
        base_model="base",
        tuned_model="tuned",
        language=language,
        created="2026-01-02T03:04:05+00:00",
        groups=group_rows(rows, normalizer),
        rows=rows,
        events=(),
        settings={},
        versions={},
    )
    return replace(report, **changes)


class Nesting(HTMLParser):
    """Checks that every element is closed where it should be, and notes what is loaded from where."""

    VOID = ("meta", "circle", "line", "polyline", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.scripts = 0
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "poster")]
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


GAIN: list[Texts] = [("turn on", "turn of", "turn on")] * 8 + [("go home", "go home", "go home")] * 4
EVIL = "<script>alert(1)</script>"


def test_page_loads_nothing_and_is_well_formed() -> None:
    events = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": float("nan")},
        {"step": 2, "eval_loss": 2.0, "eval_wer": 0.4},
    ]
    page = html_page(make_report([*GAIN, ("yes", "", "no")], seen=5, events=events, settings={"lora_r": 16}))
    nesting = Nesting(page)
    assert nesting.sources and all(source.startswith("data:audio/wav;base64,") for source in nesting.sources)
    assert "http" not in page.replace("http-equiv", "") and "url(" not in page and "@import" not in page
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page))


def test_markup_in_transcripts_names_and_settings_stays_text() -> None:
    texts = [(f"said {EVIL}", f"heard {EVIL}", f"understood {EVIL}")]
    report = make_report(
        texts, title=EVIL, base_model=EVIL, tuned_model=EVIL, settings={EVIL: EVIL}, versions={"a": EVIL}
    )
    row = replace(report.rows[0], audio=f"/x/{EVIL}.wav", speaker=EVIL)
    page = html_page(replace(report, rows=(row,)))
    assert Nesting(page).scripts == 1
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 8


def test_security_policy_lets_only_the_page_s_own_script_run() -> None:
    page = html_page(make_report(GAIN))
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script.group(1).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_only_the_worst_clips_can_be_heard_and_none_too_long() -> None:
    report = make_report([("one two three", "", "one two three")] * 5 + [("one two three", "", "one")] * 20)
    page = html_page(report)
    assert page.count("<audio") == WORST_CLIPS
    long = tuple(replace(row, wav=bytes(MAX_WAV_BYTES + 1)) for row in report.rows)
    page = html_page(replace(report, rows=long))
    assert "<audio" not in page and len(page) < 200_000


def test_worst_rows_are_those_with_most_errors_for_their_length() -> None:
    rows = make_report([("a b c d", "", "a b c x"), ("yes", "", "no no"), ("ok", "", "ok"), ("b c", "", "b x")]).rows
    assert worst_rows(rows, "wer", 10) == [1, 3, 0]
    assert worst_rows(rows, "wer", 1) == [1]


def test_what_was_missed_and_made_up_is_marked_in_the_text() -> None:
    page = html_page(make_report([("turn the light on", "turn the light on", "turn light on now")]))
    assert "<dd>turn <del>the</del> light on <ins>now</ins></dd>" in page
    assert "<dd>打<del>开</del><ins>关</ins>灯</dd>" in html_page(
        make_report([("打开灯", "打开灯", "打關燈")], language="zh")
    )


def test_seen_and_new_phrases_are_counted_apart_and_add_up() -> None:
    report = make_report(GAIN, seen=5)
    assert [(g.name, len(g.tuned.utterances)) for g in report.groups] == [("all", 12), ("seen", 5), ("new", 7)]
    assert lead_sentence(report.groups[0]) == (
        "Of 12 recordings that were kept out of training, 4 were understood exactly before, 12 after."
    )
    assert "5 of 5 after" in lead_sentence(report.groups[1])
    assert "4 of 7 before, 7 of 7 after" in lead_sentence(report.groups[2])
    # Where nothing was seen, one group says it all.
    assert [g.name for g in make_report(GAIN).groups] == ["all"]


def test_verdict_says_better_worse_or_that_it_cannot_tell() -> None:
    assert verdict(make_report(GAIN).groups[0])[0] == "better"
    worse = [(reference, tuned, base) for reference, base, tuned in GAIN]
    assert verdict(make_report(worse).groups[0])[0] == "worse"
    assert verdict(make_report(GAIN[5:10]).groups[0])[0] == "unclear"  # three of five: may be chance
    # No phrase is exact, but errors fell throughout.
    fewer = [("a b c d", "x x x x", "a b c x")] * 10
    assert verdict(make_report(fewer).groups[0])[0] == "better"


def test_screen_and_page_and_json_show_the_same_numbers() -> None:
    report = make_report([*GAIN, ("ha", "ha", "ho ho ho ho ho")], seen=6)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(format_table(report))
    screen, page, data = console.export_text(), html_page(report), report_json(report)
    for name, group in data["groups"].items():
        for model in ("base", "tuned"):
            for metric in ("wer", "cer", "exact_phrase_accuracy", "repetition_rate"):
                rate = group[model][metric]
                counts, value = f"{rate['count']}/{rate['total']}", f"{100 * rate['value']:.1f}%"
                assert counts in screen and counts in page and value in screen and value in page, (name, metric)
    assert "whisper-english-1-no-spelling-map" in screen
    assert "whisper-english-1-no-spelling-map" in page
    assert data["normalizer"] == "whisper-english-1-no-spelling-map"


def test_json_is_strict_even_for_silence_and_one_recording() -> None:
    data = report_json(make_report([("", "thanks for watching", "")], settings={"output_dir": Path("run")}))
    read = json.loads(json.dumps(data, allow_nan=False))
    assert read["groups"]["all"]["tuned"]["wer"]["value"] is None
    assert read["groups"]["all"]["base"]["wer"]["count"] == 3
    assert read["rows"][0]["base"]["wer"]["insertions"] == 3
    assert read["settings"] == {"output_dir": "run"}


@pytest.mark.parametrize("texts", [[("", "", "")], [("yes", "no", "no")], [("是", "", "是" * 400)]])
def test_page_of_one_odd_recording_is_whole(texts: list[Texts]) -> None:
    Nesting(html_page(make_report(texts, language="zh")))


def test_folder_names_of_the_machine_stay_out_of_the_page() -> None:
    assert "/home/me" not in html_page(make_report([("yes", "no", "no")]))


def test_page_is_in_the_reader_s_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESONANCE_LANG", "zh-TW")
    monkeypatch.setattr("resonance.messages.catalogue", lambda tag: {"Every recording": "所有錄音"})
    page = html_page(make_report(GAIN))
    assert '<html lang="zh-TW">' in page and "所有錄音" in page


def test_a_page_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"report\.html"):
        write_report(tmp_path / "file" / "report.html", make_report(GAIN))


def test_a_page_is_written_complete_with_nothing_beside_it(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "report.html", make_report(GAIN))
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.html"]
