"""One effective batch gives one loss and one gradient, however it is divided."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer

from resonance.train.trainer import label_token_loss

TOLERANCE = 1e-5


def close(left: Any, right: Any) -> None:
    assert left.losses == pytest.approx(right.losses, abs=TOLERANCE)
    assert left.gradient_norms == pytest.approx(right.gradient_norms, abs=TOLERANCE)
    assert left.weights.keys() == right.weights.keys()
    for name, weight in left.weights.items():
        torch.testing.assert_close(weight, right.weights[name], rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize(("finetuning", "rate", "splits"), [("lora", 0.5, [(4, 2), (1, 8)]), ("full", 0.01, [(2, 4)])])
def test_accumulation_gives_the_loss_the_gradient_and_the_weights_of_the_whole_batch(
    training: Any,
    uneven_labels: Callable[[int], Path],
    tiny_model: Path,
    tmp_path: Path,
    finetuning: str,
    rate: float,
    splits: list[tuple[int, int]],
) -> None:
    labels = uneven_labels(16)

    def run(batch: int, accumulation: int, steps: int = 2) -> Any:
        given = training.settings(labels, tiny_model, tmp_path / f"{batch}x{accumulation}-{steps}", max_steps=steps)
        given |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        return training.train(given | {"finetuning": finetuning, "learning_rate": rate})

    whole, first = run(8, 1), run(8, 1, steps=1)
    moved = max(float((whole.weights[name] - first.weights[name]).abs().max()) for name in first.weights)
    assert moved > 30 * TOLERANCE  # what is compared is being trained
    for batch, accumulation in splits:
        close(run(batch, accumulation), whole)


def test_the_last_group_of_an_epoch_is_divided_by_its_own_tokens(
    training: Any, uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path
) -> None:
    labels = uneven_labels(11)  # groups of 8 and 3

    def run(batch: int, accumulation: int) -> Any:
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        given = training.settings(labels, tiny_model, tmp_path / f"{batch}x{accumulation}", max_steps=4)
        return training.train(given | split)

    whole = run(8, 1)
    assert len(whole.losses) == 4
    close(run(2, 4), whole)  # the last group is 2 + 1 and nothing else


@pytest.mark.filterwarnings("ignore")
def test_whispers_own_loss_is_inflated_by_accumulation(
    training: Any, uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path
) -> None:
    labels = uneven_labels(8)

    def stock_loss(batch: int, accumulation: int) -> float:
        ours = training.trainer_for(
            training.settings(labels, tiny_model, tmp_path / f"{batch}")
            | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "learning_rate": 1e-9}
        )
        stock = Seq2SeqTrainer(
            model=ours.model, args=ours.args, train_dataset=ours.train_dataset, data_collator=ours.data_collator
        )
        stock._get_train_sampler = lambda dataset=None: ours.sampler
        stock.train()
        return float(stock.state.log_history[0]["loss"])

    assert stock_loss(2, 4) / stock_loss(8, 1) == pytest.approx(4.0, rel=0.15)


def outputs(labels: torch.Tensor, vocabulary: int = 50) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(logits=torch.randn(*labels.shape, vocabulary, generator=generator))


def test_the_loss_is_a_mean_over_tokens_not_over_rows() -> None:
    labels = torch.tensor([[1, 2, 3, 4], [5, -100, -100, -100]])
    made = outputs(labels)
    expected = torch.nn.functional.cross_entropy(made.logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(label_token_loss(made, labels), expected)
    torch.testing.assert_close(label_token_loss(made, labels, torch.tensor(20)), expected * 5 / 20)


def test_a_batch_in_which_nothing_counts_has_loss_and_gradient_zero() -> None:
    labels = torch.full((2, 3), -100)
    made = outputs(labels)
    made.logits.requires_grad_()
    loss = label_token_loss(made, labels, torch.tensor(12), label_smoothing=0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0 and not made.logits.grad.any()


def test_label_smoothing_needs_no_labels_in_the_model(
    training: Any, uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path
) -> None:
    labels = uneven_labels(8)
    plain, smooth = (
        training.train(training.settings(labels, tiny_model, tmp_path / str(factor), label_smoothing_factor=factor))
        for factor in (0.0, 0.2)
    )
    assert smooth.losses[0] != pytest.approx(plain.losses[0], abs=1e-4)


def test_half_precision_logits_are_summed_in_float32() -> None:
    labels = torch.zeros(64, 100, dtype=torch.long)
    logits = torch.zeros(64, 100, 50, dtype=torch.float16)
    loss = label_token_loss(SimpleNamespace(logits=logits), labels)
    # A float16 sum would stop at 65504 or lose digits on the way: 6400 x 3.912 = 25037
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(3.912023, abs=1e-5)
