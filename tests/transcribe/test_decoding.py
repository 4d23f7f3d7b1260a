"""The decoding loop against transformers' own, row by row and all together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resonance.model.load import load_whisper
from resonance.transcribe import decoding
from resonance.transcribe.decoding import generate, score

PROMPT = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"


@pytest.fixture(scope="module")
def whisper(tiny_model: Path) -> Any:
    return load_whisper(str(tiny_model), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def model(whisper: Any) -> Any:
    """With weights large enough that rows differ and end at different times."""
    torch.manual_seed(0)
    model = whisper.model
    for layer in model.model.decoder.layers:
        layer.encoder_attn.out_proj.weight.data.normal_(0, 0.6)
    model.model.decoder.embed_tokens.weight.data.mul_(3)
    return model


@pytest.fixture(scope="module")
def hidden(model: Any) -> torch.Tensor:
    return torch.randn(6, 60, model.config.d_model, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompts(whisper: Any) -> list[list[int]]:
    return [whisper.tokenizer(PROMPT, add_special_tokens=False).input_ids] * 6


def ids(found: Any) -> list[list[int]]:
    return [row.ids for row in found]


@pytest.mark.parametrize("timestamps", [False, True])
def test_the_tokens_are_those_of_transformers(
    model: Any, hidden: torch.Tensor, prompts: list[list[int]], timestamps: bool
) -> None:
    asked = [prompt[:-1] if timestamps else prompt for prompt in prompts]
    ours = generate(model, hidden, asked, timestamps=timestamps)
    theirs = generate(model, hidden, asked, timestamps=timestamps, by_transformers=True)
    assert ids(ours) == ids(theirs)
    assert len({tuple(row) for row in ids(ours)}) > 1


def test_rows_that_end_early_leave_the_others_as_they_are(
    model: Any, hidden: torch.Tensor, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = model.generation_config.eos_token_id

    def stop_early(sequences: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """By what a row has written, as a real model would: rows end at different steps."""
        scores = scores.clone()
        written = sequences[:, 4:]
        for i, row in enumerate(written.tolist()):
            scores[i, end] = 1e4 if row and (sum(row) + 7 * len(row)) % 5 == 0 else -1e4
        return scores

    monkeypatch.setattr(decoding, "_time_rules", lambda stock, prompt_length: stop_early)
    together = generate(model, hidden, prompts, timestamps=True, scores=True)
    alone = [generate(model, hidden[i : i + 1], prompts[:1], timestamps=True, scores=True)[0] for i in range(6)]
    assert ids(together) == ids(alone)
    assert len({len(row) for row in ids(together)}) > 1
    for one, other in zip(together, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
        assert one.no_speech_probability == pytest.approx(other.no_speech_probability, abs=1e-6)


def test_probabilities_are_those_of_a_second_look_at_the_whole_text(
    model: Any, hidden: torch.Tensor, prompts: list[list[int]]
) -> None:
    """The loop leaves out tokens that may not be written, so its probabilities are a little higher."""
    found = generate(model, hidden, prompts, max_length=12, scores=True)
    again = score(model, hidden, prompts, ids(found))
    for one, other in zip(found, again, strict=True):
        assert one.ids == other.ids
        assert one.no_speech_probability == pytest.approx(other.no_speech_probability, abs=1e-6)
        for given, seen in zip(one.log_probs, other.log_probs, strict=False):
            assert seen - 1e-4 <= given <= 0


def test_a_score_is_the_model_s_own_cross_entropy(model: Any, hidden: torch.Tensor, prompts: list[list[int]]) -> None:
    from transformers.modeling_outputs import BaseModelOutput

    texts = [[65, 66, 67], [70], [71, 72], [], [80, 81, 82, 83], [90]]
    end = model.generation_config.eos_token_id
    for row, found in enumerate(score(model, hidden, prompts, texts)):
        sequence = torch.tensor([[*prompts[row], *texts[row], end]])
        with torch.inference_mode():
            logits = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden[row : row + 1]),
                decoder_input_ids=sequence[:, :-1],
            ).logits[0]
        answers = sequence[0, len(prompts[row]) :]
        expected = logits[len(prompts[row]) - 1 :].log_softmax(-1).gather(1, answers[:, None])[:, 0]
        assert found.log_probs == pytest.approx(expected.tolist(), abs=1e-4)
        assert found.mean_log_prob == pytest.approx(expected.mean().item(), abs=1e-4)


def test_draws_are_the_same_each_time_and_differ_from_the_most_probable(
    model: Any, hidden: torch.Tensor, prompts: list[list[int]]
) -> None:
    drawn = [ids(generate(model, hidden, prompts, temperature=1.0, max_length=20)) for _ in range(2)]
    assert drawn[0] == drawn[1] != ids(generate(model, hidden, prompts, max_length=20))
    alone = [generate(model, hidden[i : i + 1], prompts[:1], temperature=1.0, max_length=20)[0] for i in range(6)]
    assert ids(alone) == drawn[0]  # whoever else is in the batch


def test_tokens_that_may_not_be_written_are_not(
    model: Any, hidden: torch.Tensor, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate(model, hidden, prompts, max_length=10)
    monkeypatch.setattr(model.generation_config, "suppress_tokens", [token for row in first for token in row.ids[1:2]])
    monkeypatch.setattr(model.generation_config, "begin_suppress_tokens", [first[0].ids[0]])
    found = generate(model, hidden, prompts, max_length=10)
    assert found[0].ids[0] != first[0].ids[0]
    assert not set(model.generation_config.suppress_tokens) & {token for row in found for token in row.ids}
    assert ids(found) == ids(generate(model, hidden, prompts, max_length=10, by_transformers=True))
