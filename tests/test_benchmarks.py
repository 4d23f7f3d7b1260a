"""The benchmarks run at their smallest size and end in the line that others read. No test looks at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forked

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *arguments: object, out: Path) -> tuple[list[str], dict[str, Any]]:
    """The lines that a benchmark prints and the result that it writes."""
    done = forked.run([BENCHMARKS / name, *arguments, "--out", out], out.parent)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["commit"] and result["hardware"]["cores"] and result["versions"]["torch"]
    return done.stdout.splitlines(), result


@pytest.fixture
def padding_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with the padding token that every published Whisper has; the stock recipe's collator needs it."""
    from transformers import WhisperTokenizer

    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    return folder


def test_short_clips_compares_the_same_training_and_ends_in_a_ratio(padding_model: Path, tmp_path: Path) -> None:
    small = ("--steps", 2, "--warmup", 1, "--batch", 2, "--seconds", 1, "--workers", 0)
    lines, result = run("train_short_clips.py", "--model", padding_model, *small, "--use_cpu", out=tmp_path / "r.json")
    assert re.fullmatch(r"ratio \d+\.\d\d", lines[-1])
    recipes = [result[name] for name in ("stock", "stock_longest", "ours")]
    assert len({recipe["held_out_loss_before"] for recipe in recipes}) == 1
    for recipe in recipes:
        assert len(recipe["seconds_a_step"]) == 1
        assert 0 < recipe["held_out_loss"] < recipe["held_out_loss_before"]
        assert recipe["peak_memory_gib"] > 0
    # 448 and the longest label differ in cost, not in what is learned: padding is hidden from the loss.
    assert abs(result["stock"]["final_loss"] - result["stock_longest"]["final_loss"]) < 1e-3


def test_loader_ends_in_the_share_of_waiting(tiny_model: Path, recordings: Callable[..., Path], tmp_path: Path) -> None:
    given = ("--model", tiny_model, "--data", recordings(6), "--batch", 2, "--epochs", 1)
    lines, result = run("loader.py", *given, out=tmp_path / "r.json")
    assert re.fullmatch(r"data_wait \d+\.\d\d%", lines[-1])
    assert result["steps"] == 3
    # The two meters overlap, whatever the speed: what is waited lies outside the steps.
    assert result["data_wait_percent"] <= result["outside_steps_percent"] + 5


def test_manifest_reads_every_row_of_every_format(tmp_path: Path) -> None:
    lines, result = run("manifest.py", "--rows", 20, out=tmp_path / "r.json")
    assert re.fullmatch(r"rows_per_second \d+", lines[-1])
    assert {"JSON list", "JSON map", "JSON lines", "CSV", "TSV", "Kaldi", "data folder"} <= set(result["formats"])


def test_startup_ends_in_seconds(tmp_path: Path) -> None:
    lines, result = run("startup.py", "--runs", 1, out=tmp_path / "r.json")
    assert re.fullmatch(r"seconds \d+\.\d\d", lines[-1])
    assert "resonance train --help" in result["commands"]


def test_the_memory_of_a_gpu_is_not_made_up_where_there_is_none(tmp_path: Path) -> None:
    given = [BENCHMARKS / "memory_plan.py", "--out", tmp_path / "r.json"]
    done = forked.run(given, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "no CUDA GPU" in done.stderr
    assert not (tmp_path / "r.json").exists()


def test_host_memory_compares_lists_of_two_lengths_and_the_eager_recipe(padding_model: Path, tmp_path: Path) -> None:
    small = ("--rows", "6,60", "--clips", 4, "--seconds", 1, "--steps", 2, "--batch", 2, "--workers", 0)
    lines, result = run("host_memory.py", "--model", padding_model, *small, out=tmp_path / "r.json")
    assert re.fullmatch(r"difference -?\d+ MiB", lines[-1])
    assert result["lists"]["6"]["peak_mib"] > 100 and result["lists"]["60"]["peak_mib"] > 100
    assert result["eager"]["clips_per_second"] > 0 and result["ours"]["clips_per_second"] > 0


def test_feature_cache_ends_in_a_ratio_of_the_same_clips(recordings: Callable[..., Path], tmp_path: Path) -> None:
    lines, result = run("feature_cache.py", "--data", recordings(6), "--passes", 2, out=tmp_path / "r.json")
    assert re.fullmatch(r"ratio \d+\.\d\d", lines[-1])
    assert result["clips"] == 6 and result["kib_a_clip"] > 0


def test_streaming_compares_both_loaders_and_watches_memory_by_epochs(padding_model: Path, tmp_path: Path) -> None:
    small = ("--clips", 8, "--seconds", 0.5, "--rounds", 1, "--batch", 2, "--workers", 0, "--rows", 32, "--epochs", 3)
    lines, result = run("streaming.py", "--model", padding_model, *small, out=tmp_path / "r.json")
    assert re.fullmatch(r"ratio \d+\.\d\d", lines[-1])
    assert len(result["rounds"]) == 1 and result["rounds"][0]["listed"] > 0 and result["rounds"][0]["streamed"] > 0
    assert len(result["memory_mib"]) == 3 and min(result["memory_mib"]) > 100
    assert result["last_epoch_read"] >= 1


def test_phrases_compares_with_and_without_the_list_and_keeps_no_text(
    tiny_model: Path, recordings: Callable[..., Path], tmp_path: Path
) -> None:
    labels = recordings(6)
    rows = json.loads(labels.read_text(encoding="utf-8"))
    labels.write_text(
        json.dumps([{**row, "speaker": f"S{i % 2}", "dysarthric": True} for i, row in enumerate(rows)]),
        encoding="utf-8",
    )
    lines, result = run("phrases.py", "--model", tiny_model, "--data", labels, out=tmp_path / "r.json")
    assert re.fullmatch(r"gain -?\d+\.\d\d", lines[-1])
    assert result["all"]["recordings"] == 6 and [s["phrases"] for s in result["speakers"].values()] == [3, 3]
    accepted = [row["off_list_accepted"]["count"] for row in result["all"]["rejection"]]
    assert accepted[0] == 6 and accepted == sorted(accepted, reverse=True)
    assert "phrase a0" not in (tmp_path / "r.json").read_text(encoding="utf-8")


def test_transcribe_compares_three_programs_that_write_the_same_number_of_tokens(
    openai_shaped: Path, tmp_path: Path
) -> None:
    pytest.importorskip("faster_whisper", exc_type=ImportError)
    small = (
        "--model",
        openai_shaped,
        "--clips",
        2,
        "--tokens",
        3,
        "--long_seconds",
        33,
        "--window_tokens",
        4,
        "--rounds",
        1,
        "--threads",
        1,
    )
    lines, result = run("transcribe.py", *small, "--batch", 2, out=tmp_path / "r.json")
    number = r"\d+\.\d\d"
    assert re.fullmatch(rf"ratio {number} pipeline, {number} faster-whisper, {number} long", lines[-1])
    phrases, long = result["phrases"], result["long"]
    assert len(phrases["systems"]) == 7 and len(long["systems"]) == 5
    windows, tokens = long["windows"], long["tokens_a_window"]
    ours, theirs = (windows[name] * tokens[name] for name in ("Resonance", "faster-whisper"))
    assert ours <= theirs < ours + windows["faster-whisper"]


def test_adapter_load_reads_the_same_adapters_with_and_without_peft(tmp_path: Path) -> None:
    small = ("--width", 64, "--layers", 1, "--rank", 4, "--adapters", 3, "--cycles", 8)
    lines, result = run("adapter_load.py", *small, out=tmp_path / "r.json")
    assert re.fullmatch(r"ms \d+\.\d read_adapter, \d+\.\d peft", lines[-1])
    assert result["ms"].keys() == {"read_adapter", "pool", "peft"} and len(result["resident_mib"]) == 4
    assert result["adapter_bytes"] == 6 * 2 * 64 * 4 * 4


def test_serve_load_answers_everybody_as_themselves(openai_shaped: Path, tmp_path: Path) -> None:
    small = ("--requests", 40, "--clients", 8, "--patients", 9, "--bad_share", 0.2, "--gone_share", 0.1, "--threads", 1)
    lines, result = run("serve_load.py", "--model", openai_shaped, *small, out=tmp_path / "r.json")
    assert lines[-1] == "answered 40 of 40, 0 faults"
    assert {name.split()[-1] for name in result["statuses"]} <= {"200", "201", "400", "404", "413", "414", "415", "422"}
    assert sum(count for name, count in result["statuses"].items() if name.startswith("bad: ")) >= 3
    assert result["went_away"] and result["adapters"] and result["memory"]["samples"]
