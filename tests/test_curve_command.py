"""`resonance curve`: the same training on more and more recordings, each measured on the same held-out ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from resonance.cli import run
from resonance.evaluate import evaluation
from resonance.evaluate.curve import Point, advice, format_table, html_page
from resonance.evaluate.metrics import measure
from resonance.evaluate.normalize import normalizer_for
from resonance.evaluate.results import EvaluationReport, Row, group_rows
from resonance.learning_curve import usable_sizes
from resonance.model.runs import read_events

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture
def curve(tiny_model: Path) -> Callable[..., int]:
    """A function that runs a short `resonance curve` and returns its exit code."""

    def command(labels: Path, out: Path, *flags: str) -> int:
        given = [
            "curve",
            "--model_name_or_path",
            str(tiny_model),
            "--train_file",
            str(labels),
            "--output_dir",
            str(out),
        ]
        fast = ("--max_steps=2", "--logging_steps=1", "--dataloader_num_workers=0", "--context_alignment_steps=0")
        return run([*given, *fast, *flags])

    return command


def texts(path: Path) -> list[str]:
    return [row["text"] for row in json.loads(path.read_text(encoding="utf-8"))]


def test_a_larger_training_holds_the_smaller_one_and_none_the_recordings_it_is_measured_on(
    curve: Callable[..., int], recordings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "curve"
    assert curve(recordings(12), out, "--sizes=3,6,100") == 0
    found = json.loads((out / "curve.json").read_text(encoding="utf-8"))
    assert [point["recordings"] for point in found["points"]] == [3, 6, 9]  # 100: all that there are
    three, six, nine = (texts(out / "data" / f"train-{size}.json") for size in (3, 6, 9))
    held_out = texts(out / "data" / "test.json")
    assert (three, six) == (nine[:3], nine[:6])
    assert len(held_out) == 3 and not set(held_out) & set(nine)
    for point in found["points"]:
        assert point["groups"]["all"]["utterances"] == 3
        trained = json.loads((out / str(point["recordings"]) / "adapter" / "resonance.json").read_text())
        assert trained["data"]["train_rows"] == point["recordings"]
    shown = capsys.readouterr().out
    assert "0 (before)" in shown and str(out / "curve.html") in shown.replace("\n", "")


def test_the_base_transcribes_the_held_out_recordings_once(
    curve: Callable[..., int], recordings: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = evaluation.base_texts, []
    monkeypatch.setattr(evaluation, "base_texts", lambda *given: calls.append(given) or real(*given))
    assert curve(recordings(8), tmp_path / "curve", "--sizes=2,4", "--language=en") == 0
    points = json.loads((tmp_path / "curve" / "curve.json").read_text(encoding="utf-8"))["points"]
    assert len(calls) == 1 and len(points) == 2
    reports = [json.loads((tmp_path / "curve" / size / "report.json").read_text(encoding="utf-8")) for size in "24"]
    assert reports[0]["groups"]["all"]["base"] == reports[1]["groups"]["all"]["base"]


def test_a_curve_that_was_stopped_goes_on_without_training_a_size_twice(
    curve: Callable[..., int], recordings: Callable[..., Path], tmp_path: Path
) -> None:
    labels, out = recordings(8), tmp_path / "curve"
    assert curve(labels, out, "--sizes=3") == 0
    weights = out / "3" / "adapter" / "adapter_model.safetensors"
    before = weights.stat().st_mtime_ns
    assert curve(labels, out, "--sizes=3,5") == 0
    assert weights.stat().st_mtime_ns == before
    assert [row["step"] for row in read_events(out / "5" / "events.jsonl") if "loss" in row] == [1, 2]


def test_a_curve_with_nothing_to_measure_on_is_refused(
    curve: Callable[..., int], recordings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curve(recordings(6), tmp_path / "curve", "--validation_split=0") == 2
    assert "--validation_file or --validation_split" in capsys.readouterr().err
    assert not (tmp_path / "curve").exists()


@pytest.mark.parametrize(
    ("sizes", "available", "expected"),
    [([10, 30, 50, 100], 60, [10, 30, 50, 60]), ([10, 30], 60, [10, 30]), ([30, 10, 10], 8, [8])],
)
def test_sizes_beyond_what_there_is_become_all_of_it(sizes: list[int], available: int, expected: list[int]) -> None:
    assert usable_sizes(sizes, available) == expected


def point(recordings: int, right: int, total: int = 40) -> Point:
    """A training after which the first `right` of `total` recordings are understood."""
    normalizer = normalizer_for("en")
    said = [f"word {i}" for i in range(total)]
    results = [measure([(text, text if i < right else "no")], normalizer)[0] for i, text in enumerate(said)]
    wrong = [measure([(text, "no")], normalizer)[0] for text in said]
    rows = [Row(f"{i}.wav", text, "no", "", wrong[i], results[i], seen=i % 2 == 0) for i, text in enumerate(said)]
    report = EvaluationReport("t", "base", "tuned", "en", "2026", group_rows(rows, normalizer), rows, [], {}, {})
    return Point(recordings, report)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(10, 25, "more of them will probably help"), (10, 12, "may be chance"), (25, 8, "made it worse")],
)
def test_the_advice_follows_the_last_two_points(before: int, after: int, expected: str) -> None:
    assert expected in advice([point(10, 2), point(30, before), point(60, after)])


def test_the_table_is_whole_on_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=80).print(format_table([point(10, 10, 140), point(30, 140, 140)]))
    shown = capsys.readouterr().out
    assert shown.count("100.0%  70/70") == 2 and shown.count("(94.8–100.0%)") == 2


def test_the_page_shows_each_point_with_its_interval() -> None:
    page = html_page("Curve <b>", [point(10, 10), point(30, 30)])
    assert "Curve &lt;b&gt;" in page and "<b>" not in page
    assert page.count('class="whisker b"') == 2
    assert "25.0%  10/40" in page and "75.0%  30/40" in page
    assert page.count('class="curve a"') == 1  # the base's level
