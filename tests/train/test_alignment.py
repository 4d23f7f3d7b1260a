"""Before training, the encoder learns to give at the length of the audio what the base gives for 30 s."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from resonance.config import TrainConfig, alignment_steps
from resonance.config_io import load_yaml
from resonance.data.audio import read_audio
from resonance.data.audio_context import AudioContext
from resonance.data.batches import batch_features
from resonance.data.check import probe_durations
from resonance.data.formats import load_manifest
from resonance.data.manifest import Utterance
from resonance.errors import ConfigError
from resonance.model import lora
from resonance.model.load import load_whisper
from resonance.model.runs import read_events
from resonance.train.alignment import Difference, align_audio_context

SHORT = AudioContext("auto", 0.6)


def with_lora(folder: Path, modules: str = "q_proj,v_proj") -> Any:
    whisper = load_whisper(str(folder), device=torch.device("cpu"))
    torch.manual_seed(0)
    return lora.add_lora(whisper.model, r=8, alpha=16, dropout=0.5, target_modules=modules.split(","))


def align(model: Any, rows: list[Utterance], steps: int, seed: int = 1, at_once: int = 4) -> Difference:
    return align_audio_context(
        model,
        rows,
        SHORT,
        80,
        steps=steps,
        batch_size=4,
        at_once=at_once,
        learning_rate=1e-2,
        precision="fp32",
        seed=seed,
    )


@pytest.fixture
def rows(recordings: Callable[..., Path]) -> list[Utterance]:
    return probe_durations(load_manifest(recordings(count=8)).utterances)


def test_a_real_encoder_comes_close_to_its_own_answer_for_30_seconds(shared: Path, real_model: Path) -> None:
    folder = shared / "data" / "torgo"
    rows = [row for row in json.loads((folder / "labels.json").read_text()) if row["speaker"] == "F03"]
    heard = probe_durations([Utterance(str(folder / row["audio"]), row["text"], i) for i, row in enumerate(rows[:4])])
    found = align_audio_context(
        with_lora(real_model),
        heard,
        SHORT,
        80,
        steps=10,
        batch_size=4,
        at_once=4,
        learning_rate=2e-3,
        precision="fp32",
        seed=1,
    )
    assert found.before > 0.1 and found.after < 0.6 * found.before


def test_the_difference_is_to_the_base_s_own_answer_for_30_seconds(tiny_model: Path, rows: list[Utterance]) -> None:
    # Targets that follow the weights would be reached at once, and the difference mean nothing.
    base, model = with_lora(tiny_model), with_lora(tiny_model, "all-linear")
    rows = rows[:4]  # one batch
    found = align(model, rows, steps=20)
    clips = [read_audio(row.audio) for row in sorted(rows, key=lambda row: row.duration or 0.0)]
    base.eval(), model.eval()
    with torch.no_grad():
        short, now = (m.get_base_model().model.encoder(batch_features(clips, SHORT, 80))[0] for m in (base, model))
        full = base.get_base_model().model.encoder(batch_features(clips, AudioContext("full", 0.0), 80))[0]
    full = full[:, : now.shape[1]]
    assert found.before == pytest.approx(float((short - full).square().mean() / full.var()), rel=0.01)
    assert found.after == pytest.approx(float((now - full).square().mean() / full.var()), rel=0.01)
    assert found.after < 0.9 * found.before


def test_the_fit_is_learnt_in_16_bits_too(tiny_model: Path, rows: list[Utterance]) -> None:
    # Autocast copies weights to 16 bits once for as long as it lasts: in one block around all steps, nothing is learnt.
    model = with_lora(tiny_model, "all-linear")
    found = align_audio_context(
        model, rows[:4], SHORT, 80, steps=20, batch_size=4, at_once=4, learning_rate=1e-2, precision="bf16", seed=1
    )
    assert found.after < 0.9 * found.before


def test_clips_seen_one_at_a_time_teach_the_same(tiny_model: Path, rows: list[Utterance]) -> None:
    models = [with_lora(tiny_model), with_lora(tiny_model)]
    found = [align(model, rows, steps=4, at_once=at_once) for model, at_once in zip(models, (4, 1), strict=True)]
    assert found[0].after == pytest.approx(found[1].after, rel=1e-4)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_only_the_encoder_s_trainable_weights_move(tiny_model: Path, rows: list[Utterance]) -> None:
    model = with_lora(tiny_model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    align(model, rows, steps=4)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if ".encoder." in name and "lora_" in name}
    assert all(weight.grad is None for weight in model.parameters())


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_random_state(
    tiny_model: Path, rows: list[Utterance]
) -> None:
    found = []
    for draws in (1, 5):
        model = with_lora(tiny_model)
        torch.rand(draws)  # whatever else this process has drawn; dropout of 0.5 would show it
        state = torch.get_rng_state()
        align(model, rows, steps=4)
        assert torch.equal(torch.get_rng_state(), state)
        found.append([weight.detach() for weight in model.parameters() if weight.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"max_steps": 500}, 80),
        ({"max_steps": 30}, 10),
        ({"max_steps": 500, "context_alignment_steps": 7}, 7),
        ({"num_train_epochs": 3}, 80),
        ({"audio_context": "full"}, 0),
        ({"audio_context": 30}, 0),
        ({"finetuning": "frozen_encoder"}, 0),
    ],
)
def test_how_many_updates_are_made(given: dict[str, Any], steps: int) -> None:
    config = TrainConfig.model_validate({"train_file": "x.json", "output_dir": "out", **given})
    assert alignment_steps(config) == steps


@pytest.mark.parametrize("other", [{"audio_context": "full"}, {"finetuning": "frozen_encoder"}])
def test_updates_that_could_change_nothing_are_refused(other: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({"train_file": "x.json", "output_dir": "out", "context_alignment_steps": 5, **other}))
    with pytest.raises(ConfigError, match="context_alignment_steps 5"):
        load_yaml(TrainConfig, path)


def test_training_aligns_first_and_logs_it_once(
    train: Callable[..., int], recordings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = recordings()
    assert train(labels, tmp_path / "run", "--context_alignment_steps=3") == 0
    assert "Audio context: what the model hears at the length of the recordings" in capsys.readouterr().out
    [row] = [row for row in read_events(tmp_path / "run" / "events.jsonl") if "context_difference" in row]
    assert row["context_difference"] < row["context_difference_before"]
    # On from the last checkpoint: it holds what was learnt, and a second time would spoil it.
    assert train(labels, tmp_path / "run", "--context_alignment_steps=3", "--max_steps=5", "--resume") == 0
    assert "Audio context:" not in capsys.readouterr().out


def test_a_base_that_was_trained_at_a_short_context_is_not_aligned_to_30_seconds(
    train: Callable[..., int], recordings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = recordings()
    assert train(labels, tmp_path / "first", "--finetuning=full", "--max_steps=1", "--eval_steps=1") == 0
    capsys.readouterr()
    base = tmp_path / "first" / "model"
    assert train(labels, tmp_path / "next", f"--model_name_or_path={base}", "--context_alignment_steps=3") == 0
    assert "Audio context:" not in capsys.readouterr().out
