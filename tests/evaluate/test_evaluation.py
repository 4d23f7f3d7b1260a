"""Which rows are scored, which are refused, and what the reader is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

from resonance.config_recognizer import EvaluateConfig
from resonance.data.manifest import Utterance
from resonance.errors import ConfigError, DataError
from resonance.evaluate import evaluation
from resonance.evaluate.evaluation import only_language, provenance, read_rows, trained_on
from resonance.model.adapters import Info
from resonance.model.runs import RunFolder


def utterance(audio: Path | str, text: str = "hello", **fields: Any) -> Utterance:
    return Utterance(str(audio), text, 1, **fields)


def sound(path: Path, level: float) -> Path:
    soundfile.write(path, [level] * 1600, 16_000)
    return path


def test_a_trained_recording_is_known_by_its_place_or_by_its_sound_and_text(tmp_path: Path) -> None:
    trained = sound(tmp_path / "trained.wav", 0.1)
    same_sound, other_sound = sound(tmp_path / "copy.wav", 0.1), sound(tmp_path / "take2.wav", 0.2)
    train = [utterance(trained, start=0.0), utterance(tmp_path / "gone.wav")]
    test = [
        utterance(trained, "other text"),  # the same place
        utterance(same_sound, "Hello."),  # a copy
        utterance(other_sound),  # another take of the phrase
        utterance(trained, start=0.05),  # another part of the same file
        utterance(same_sound, "not hello"),  # e.g. beeps that sound alike
    ]
    assert [test.index(row) for row in trained_on(test, train)] == [0, 1]
    assert trained_on(test, []) == []


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["en", "en"], "en"),
        (["English"], "en"),
        (["zh", "en"], None),
        ([None, "en"], None),
        ([None], None),
        (["xx"], None),
    ],
)
def test_the_language_of_a_stock_model_s_rows_is_what_all_of_them_name(
    named: list[str | None], expected: str | None
) -> None:
    assert only_language([utterance("a.wav", language=language) for language in named]) == expected


def config(run: Path, **fields: Any) -> EvaluateConfig:
    return EvaluateConfig(model_path=str(run), **fields)


def test_without_a_test_file_the_rows_are_those_that_the_run_wrote_down(finished_run: Path, tmp_path: Path) -> None:
    test, train = read_rows(config(finished_run), RunFolder(finished_run))
    assert train is not None and (len(test), len(train)) == (3, 9)
    assert all(row.duration for row in test)
    assert len(read_rows(config(finished_run, max_eval_samples=2), RunFolder(finished_run))[0]) == 2
    with pytest.raises(ConfigError, match="--test_file is needed"):
        read_rows(config(tmp_path), None)


def test_trained_rows_are_refused_also_behind_the_limit_of_rows(finished_run: Path, tmp_path: Path) -> None:
    rows = [json.loads((finished_run / "data" / name).read_text())[0] for name in ("held_out.json", "train.json")]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"1 of the recordings .* row 2"):
        read_rows(config(finished_run, test_file=tmp_path / "test.json", max_eval_samples=1), RunFolder(finished_run))


@pytest.mark.parametrize(("best", "said"), [(True, 1), (False, 0)])
def test_the_note_on_the_chosen_checkpoint_is_there_only_when_one_was_chosen(
    best: bool, said: int, finished_run: Path
) -> None:
    path = finished_run / "adapter" / "resonance.json"
    info = Info.model_validate_json(path.read_text()).model_copy(update={"settings": {"load_best_model_at_end": best}})
    run = RunFolder(finished_run)
    test, train = read_rows(config(finished_run), run)
    assert len(provenance(info, run, test, train)) == said
    assert len(provenance(info, run, [utterance("elsewhere.wav")], train)) == 0


def test_clips_in_the_report_are_the_spans_that_were_scored_and_bounded(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", [0.1] * (16_000 * 3), 16_000)
    whole = utterance(tmp_path / "long.wav", duration=3.0)
    span = utterance(tmp_path / "long.wav", start=1.0, end=1.5, duration=0.5)
    sizes = [len(evaluation.clip_as_wav(row)) for row in (whole, span)]
    assert sizes == [3 * 32_000 + 44, 16_000 + 44]
