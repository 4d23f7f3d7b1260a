"""`resonance evaluate` as its user sees it: base against tuned, honestly, on the screen, as a page and as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from resonance.cli import run

pytestmark = pytest.mark.usefixtures("short_answers")
Capture = pytest.CaptureFixture[str]


def evaluate(model: Path | str, out: Path, *flags: object) -> int:
    return run(["evaluate", "--model_path", str(model), "--output_dir", str(out), *map(str, flags)])


def report(out: Path) -> dict:
    return json.loads((out / "report.json").read_text(encoding="utf-8"))


def flat(text: str) -> str:
    """Screen text without the line breaks of a narrow terminal."""
    return " ".join(text.split())


def test_a_run_is_measured_on_what_it_held_out_and_says_that_those_rows_chose_the_checkpoint(
    finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert evaluate(finished_run, tmp_path / "out") == 0
    said = flat(capsys.readouterr().out)
    assert "before" in said and "after" in said and "kept out of training" in said
    found = report(tmp_path / "out")
    held_out = json.loads((finished_run / "data" / "held_out.json").read_text())
    assert {row["audio"] for row in found["rows"]} == {row["audio"] for row in held_out}
    assert found["groups"]["all"]["utterances"] == 3
    sentence = "The best checkpoint of the training was chosen on these same recordings"
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert sentence in said and sentence in page and any(sentence in note for note in found["notes"])


def test_other_recordings_did_not_choose_the_checkpoint(
    finished_run: Path, tmp_path: Path, recordings: Callable[..., Path], capsys: Capture
) -> None:
    labels = recordings(count=4, seconds=(1.3, 1.5))
    assert evaluate(finished_run, tmp_path / "out", "--test_file", labels) == 0
    said = capsys.readouterr().out
    assert "chosen on these" not in said and "not known" not in said


def test_phrases_seen_in_training_and_new_ones_are_told_apart(
    finished_run: Path, tmp_path: Path, recordings: Callable[..., Path], capsys: Capture
) -> None:
    trained = json.loads((finished_run / "data" / "train.json").read_text())
    labels = recordings(count=4, seconds=(1.3, 1.5))
    rows = json.loads(labels.read_text())
    rows[0]["text"], rows[1]["text"] = trained[0]["text"].upper() + "!", trained[1]["text"]
    rows[2]["text"], rows[3]["text"] = "something new", "and another"
    labels.write_text(json.dumps(rows))
    assert evaluate(finished_run, tmp_path / "out", "--test_file", labels) == 0
    found = report(tmp_path / "out")
    assert [row["seen"] for row in found["rows"]] == [True, True, False, False]
    assert {name: group["utterances"] for name, group in found["groups"].items()} == {"all": 4, "seen": 2, "new": 2}


@pytest.mark.parametrize("place", ["the same file", "another path", "a copy"])
def test_recordings_that_were_trained_on_are_refused(
    place: str, finished_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    row = json.loads((finished_run / "data" / "train.json").read_text())[0]
    if place == "a copy":
        row["audio"] = str(shutil.copy(row["audio"], tmp_path / "copy.wav"))
    elif place == "another path":
        (tmp_path / "link.wav").symlink_to(row["audio"])
        row["audio"] = str(tmp_path / "link.wav")
    (tmp_path / "test.json").write_text(json.dumps([row]))
    assert evaluate(finished_run, tmp_path / "out", "--test_file", tmp_path / "test.json") == 1
    said = capsys.readouterr().err
    assert "trained on" in said and row["audio"] in said and "--test_file" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_an_adapter_far_from_its_run_says_that_training_is_not_known(
    finished_run: Path, tmp_path: Path, recordings: Callable[..., Path], capsys: Capture
) -> None:
    adapter = tmp_path / "carried away"
    shutil.copytree(finished_run / "adapter", adapter)
    labels = recordings(count=2, seconds=(1.3, 1.5))
    assert evaluate(adapter, tmp_path / "out") == 2
    assert "--test_file" in capsys.readouterr().err
    assert evaluate(adapter, tmp_path / "out", "--test_file", labels) == 0
    assert "not known here" in flat(capsys.readouterr().out)
    assert [row["seen"] for row in report(tmp_path / "out")["rows"]] == [None, None]
    given = ("--test_file", labels, "--train_file", finished_run / "data" / "train.json")
    assert evaluate(adapter, tmp_path / "out", *given) == 0
    assert "not known here" not in flat(capsys.readouterr().out)
    assert evaluate(adapter, tmp_path / "out", "--test_file", labels, "--train_file", tmp_path / "typo.json") == 1
    assert "typo.json" in capsys.readouterr().err


def test_a_stock_model_is_scored_alone(
    tiny_model: Path, tmp_path: Path, recordings: Callable[..., Path], capsys: Capture
) -> None:
    assert evaluate(tiny_model, tmp_path / "out", "--test_file", recordings(count=3), "--language", "en") == 0
    said = flat(capsys.readouterr().out)
    assert "before" not in said and "result" in said and "no model to compare it with" in said
    found = report(tmp_path / "out")
    assert found["verdict"] == "alone" and found["base_model"] is None
    assert found["groups"]["all"]["base"] is None and found["groups"]["all"]["difference"] is None
    assert found["groups"]["all"]["tuned"]["exact_phrase_accuracy"]["total"] == 3
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert ">before<" not in page and ">after<" not in page and ">result<" in page


def test_a_run_is_found_from_inside_its_folder(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    run_folder = tmp_path / "my run"
    shutil.copytree(finished_run, run_folder)
    monkeypatch.chdir(run_folder)
    assert run(["evaluate", "--model_path", ".", "--max_eval_samples", "1"]) == 0
    assert report(run_folder)["title"] == "How well my run is understood"
    assert (run_folder / "report.html").is_file()
    assert not (run_folder / "evaluation").exists()


def test_a_real_person_s_base_and_tuned_texts_are_compared(
    shared: Path, real_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The stock checkpoint on short words of one speaker of TORGO: known words are recognised, in the report too."""
    folder = shared / "data" / "torgo"
    rows = [row for row in json.loads((folder / "labels.json").read_text()) if row["speaker"] == "M03"]
    words = [row | {"audio": str(folder / row["audio"])} for row in rows if " " not in row["text"]][:3]
    (tmp_path / "test.json").write_text(json.dumps(words))
    assert evaluate(real_model, tmp_path / "out", "--test_file", tmp_path / "test.json") == 0
    found = report(tmp_path / "out")
    assert found["language"] == "en" and found["main_metric"] == "wer"  # as the rows say
    texts = {row["reference"]: row["tuned"]["normalized"] for row in found["rows"]}
    assert texts["ship"] == "ship"
    assert found["groups"]["all"]["tuned"]["exact_phrase_accuracy"]["value"] >= 0.5
