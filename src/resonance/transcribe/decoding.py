"""Whisper's decoder, token by token: a whole batch at any audio context, with the probability of what it writes.

transformers' `generate` gives the same tokens. This loop needs no second pass for probabilities and drops rows that have
ended. A token takes 0.89 to 0.95 of the time on one core with a model of whisper-tiny's shape: it is not there for speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from resonance.model.mixing import keep_rows
from resonance.transcribe.fallback import Decoded
from resonance.units import TIMESTAMP_STEP_SECONDS

# Fast Mandarin and fast English stay below 15 tokens a second. A repetition loop is cut off there, not at 448 tokens.
TOKENS_PER_SECOND = 20
TOKENS_AT_LEAST = 24
# Logits are worked on in float32 for so many tokens at once: 100 MB with Whisper's 51,865 tokens.
LOGIT_ROWS = 512

# What changes scores [rows, vocabulary] given the ids so far [rows, tokens], prompt included, as transformers' processors do.
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Puts the adapters of some rows of a batch in place for as long as its block lasts.
Speaking = Callable[[Sequence[int]], AbstractContextManager[None]]


def one_voice(_rows: Sequence[int]) -> AbstractContextManager[None]:
    """All rows go through the same adapter, which is in place."""
    return nullcontext()


class Decoder:
    """The decoder layers of one Whisper, LoRA and all, over the keys and values kept for one batch.

    hidden: the encoder's output [rows, positions, d_model]; `most`: tokens there will be at most; `lengths`: how many positions
    of each row there are, where the others only fill up. None: all are.
    """

    def __init__(self, whisper: Any, hidden: torch.Tensor, most: int, lengths: Sequence[int] | None = None) -> None:
        self.whisper = whisper
        self.audible: torch.Tensor | None = None  # [rows, 1, 1, positions]
        if lengths is not None and min(lengths) < hidden.shape[1]:
            there = torch.tensor(lengths, device=hidden.device)[:, None]
            self.audible = (torch.arange(hidden.shape[1], device=hidden.device) < there)[:, None, None]
        self.layers = whisper.model.decoder.layers
        self.length = 0
        heads, width = self.layers[0].self_attn.num_heads, self.layers[0].self_attn.head_dim
        empty = hidden.new_empty((len(hidden), heads, most, width))
        self.kept = [(torch.empty_like(empty), torch.empty_like(empty)) for _layer in self.layers]
        self.heard = [
            (_heads(layer.encoder_attn.k_proj(hidden), heads), _heads(layer.encoder_attn.v_proj(hidden), heads))
            for layer in self.layers
        ]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states [rows, tokens, d_model] for the next ids [rows, tokens], which are remembered."""
        decoder = self.whisper.model.decoder
        start, end = self.length, self.length + ids.shape[1]
        self.length = end
        state = decoder.embed_tokens(ids) + decoder.embed_positions(ids, past_key_values_length=start)
        # Row i of several new tokens sees what was there and the new ones up to itself.
        mask = None
        if ids.shape[1] > 1:
            mask = torch.ones(ids.shape[1], end, dtype=torch.bool, device=ids.device).tril(start)
        for layer, (keys, values), (heard_keys, heard_values) in zip(self.layers, self.kept, self.heard, strict=True):
            own = layer.self_attn
            normed = layer.self_attn_layer_norm(state)
            keys[:, :, start:end] = _heads(own.k_proj(normed), own.num_heads)
            values[:, :, start:end] = _heads(own.v_proj(normed), own.num_heads)
            state = state + _attend(own, normed, keys[:, :, :end], values[:, :, :end], mask)
            normed = layer.encoder_attn_layer_norm(state)
            state = state + _attend(layer.encoder_attn, normed, heard_keys, heard_values, self.audible)
            state = state + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(state))))
        return decoder.layer_norm(state)  # type: ignore[no-any-return]

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """float32 [..., vocabulary] for hidden states [..., d_model]."""
        return self.whisper.proj_out(state).float()  # type: ignore[no-any-return]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        keep_rows(self.whisper, rows)
        self.kept = [(keys[rows], values[rows]) for keys, values in self.kept]
        self.heard = [(keys[rows], values[rows]) for keys, values in self.heard]
        self.audible = None if self.audible is None else self.audible[rows]


def _heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """[rows, tokens, width] as [rows, heads, tokens, width / heads]."""
    return states.view(*states.shape[:2], heads, -1).transpose(1, 2)


def _attend(
    attention: Any, normed: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    queries = _heads(attention.q_proj(normed) * attention.scaling, attention.num_heads)
    found = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
    return attention.out_proj(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def most_tokens(whisper: Any, positions: int, prompt_length: int, max_length: int | None = None) -> int:
    """Tokens, prompt included, that are written at most for a clip of so many encoder positions."""
    most = int(positions * TIMESTAMP_STEP_SECONDS * TOKENS_PER_SECOND) + TOKENS_AT_LEAST
    return int(min(prompt_length + most, max_length or whisper.config.max_target_positions))


def unwrap(model: Any) -> Any:
    """The WhisperForConditionalGeneration inside a PeftModel, adapters in place; otherwise the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def encode(model: Any, input_features: torch.Tensor) -> torch.Tensor:
    """The encoder's output [batch, frames / 2, d_model] for features [batch, n_mels, frames] at any audio context."""
    encoder = unwrap(model).model.encoder
    hidden: torch.Tensor = encoder(input_features.to(model.device, encoder.conv1.weight.dtype)).last_hidden_state
    return hidden


@torch.inference_mode()
def decode(
    model: Any,
    input_features: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int = 1,
    max_length: int | None = None,
    by_transformers: bool = False,
) -> torch.Tensor:
    """Token ids [batch, tokens] after each prompt, `<|endoftext|>` behind the shorter ones.

    input_features: [batch, n_mels, frames] at any audio context; prompts: equally long. One window a row: Whisper's own
    long-form `generate` would pad every clip to 30 s again.
    """
    whisper = unwrap(model)
    found = generate(
        whisper,
        encode(model, input_features),
        prompts,
        num_beams=num_beams,
        max_length=max_length,
        by_transformers=by_transformers,
    )
    rows = [torch.tensor(row.ids, dtype=torch.long, device=whisper.device) for row in found]
    return torch.nn.utils.rnn.pad_sequence(rows, True, whisper.generation_config.eos_token_id)


@torch.inference_mode()
def generate(
    whisper: Any,
    hidden: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    num_beams: int = 1,
    timestamps: bool = False,
    temperature: float = 0.0,
    scores: bool = False,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    lengths: Sequence[int] | None = None,
    by_transformers: bool = False,
) -> list[Decoded]:
    """Write the text of each row of hidden [rows, positions, d_model], after prompts that are equally long.

    lengths: positions of each row, where the others only fill up; not for beams.

    Above temperature 0 tokens are drawn, the same ones each time and in every batch. `num_beams` counts at temperature 0 only.
    With `scores`, the probability of each token and of silence too; for beams they take another pass.
    `by_transformers`: where the layers have to be called whole because their weights lie in parts (ZeRO-3, FSDP).
    """
    prompt = torch.tensor(prompts, device=hidden.device)
    positions = lengths or [hidden.shape[1]] * len(hidden)
    most = [most_tokens(whisper, count, prompt.shape[1], max_length) for count in positions]
    if max_new_tokens:
        most = [min(each, prompt.shape[1] + max_new_tokens) for each in most]
    if (num_beams > 1 or by_transformers) and not temperature:
        if set(positions) != {hidden.shape[1]}:
            raise ValueError("beams need rows of equal lengths: transformers' decoder hears whatever fills up")
        found = _by_transformers(whisper, hidden, prompt, num_beams, timestamps, most[0])
        return score(whisper, hidden, prompts, found) if scores else [Decoded(ids, [], None) for ids in found]
    return _one_by_one(whisper, hidden, prompt, timestamps, temperature, most, scores, lengths)


def _one_by_one(
    whisper: Any,
    hidden: torch.Tensor,
    prompt: torch.Tensor,
    timestamps: bool,
    temperature: float,
    most: list[int],
    scores: bool,
    lengths: Sequence[int] | None,
) -> list[Decoded]:
    """Greedily, or drawn at a temperature. most: tokens of each row, prompt included."""
    stock = whisper.generation_config
    end = stock.eos_token_id
    rules = [_time_rules(stock, prompt.shape[1])] if timestamps else []
    vocabulary = whisper.proj_out.out_features
    never = _ids(getattr(stock, "suppress_tokens", None), vocabulary, hidden.device)
    not_first = _ids(getattr(stock, "begin_suppress_tokens", None), vocabulary, hidden.device)
    chances = [torch.Generator().manual_seed(0) for _row in prompt]  # each row's own: what is drawn depends on no other

    decoder = Decoder(whisper, hidden, max(most), lengths)
    state = decoder(prompt)
    silence: list[float | None] = [None] * len(prompt)
    if scores:
        silence = no_speech_probability(decoder.logits(state[:, _start(whisper, prompt)]), stock)
    alive = torch.arange(len(prompt), device=hidden.device)  # which rows `sequences` and the decoder hold
    written: list[list[int]] = [[] for _row in prompt]
    log_probs: list[list[float]] = [[] for _row in prompt]
    sequences, running = prompt, torch.ones(len(prompt), dtype=torch.bool, device=hidden.device)
    limits = torch.tensor(most, device=hidden.device)
    while True:
        logits = decoder.logits(state[:, -1])
        logits[:, never] = -torch.inf
        if sequences.shape[1] == prompt.shape[1]:
            logits[:, not_first] = -torch.inf
        for rule in rules:
            logits = rule(sequences, logits)
        if temperature:
            # The largest of Gumbel's noise and the logits is a draw from their softmax.
            noise = torch.stack([torch.rand(vocabulary, generator=chances[row]) for row in alive.tolist()])
            gumbel = -(-noise.clamp(min=1e-12).log()).log().to(logits.device)
            chosen = (logits / temperature + gumbel).argmax(-1)
        else:
            chosen = logits.argmax(-1)
        if scores:
            found = (logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(-1)).tolist()
            for row, log_prob, runs in zip(alive.tolist(), found, running.tolist(), strict=True):
                if runs:
                    log_probs[row].append(log_prob)
        for row, token, runs in zip(alive.tolist(), chosen.tolist(), running.tolist(), strict=True):
            if runs:
                written[row].append(token)
        sequences = torch.cat([sequences, chosen[:, None]], dim=1)
        running = running & chosen.ne(end) & (limits > sequences.shape[1])
        left = int(running.sum())
        if not left:
            break
        if left <= len(running) // 2:  # a shorter batch pays for the copy
            rows = running.nonzero()[:, 0]
            decoder.keep(rows)
            alive, sequences, running, limits = alive[rows], sequences[rows], running[rows], limits[rows]
        state = decoder(sequences[:, -1:])
    return [
        Decoded(ids[:-1] if ids[-1] == end else ids, probs, quiet, temperature)
        for ids, probs, quiet in zip(written, log_probs, silence, strict=True)
    ]


def _by_transformers(
    whisper: Any,
    hidden: torch.Tensor,
    prompt: torch.Tensor,
    num_beams: int,
    timestamps: bool,
    most: int,
) -> list[list[int]]:
    """The ids of the best beam of each row."""
    stock = whisper.generation_config
    settings = GenerationConfig(
        max_length=most,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=stock.eos_token_id,
        pad_token_id=stock.eos_token_id,
        bos_token_id=stock.bos_token_id,
        decoder_start_token_id=stock.decoder_start_token_id,
        suppress_tokens=getattr(stock, "suppress_tokens", None),
        begin_suppress_tokens=getattr(stock, "begin_suppress_tokens", None),
    )
    rules = [_time_rules(stock, prompt.shape[1])] if timestamps else []
    sequences = GenerationMixin.generate(
        whisper,
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        decoder_input_ids=prompt,
        attention_mask=torch.ones(hidden.shape[:2], device=hidden.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList(rules),
    )[:, prompt.shape[1] :].tolist()
    end = stock.eos_token_id
    return [ids[: ids.index(end)] if end in ids else ids for ids in sequences]


@torch.inference_mode()
def score(
    whisper: Any,
    hidden: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    lengths: Sequence[int] | None = None,
) -> list[Decoded]:
    """Texts of tokens with the probability that the model gives each, and the end after it, in one pass."""
    end = whisper.generation_config.eos_token_id
    longest = max(map(len, texts))
    rows = [[*prompt, *text, *[end] * (longest - len(text))] for prompt, text in zip(prompts, texts, strict=True)]
    ids = torch.tensor(rows, device=hidden.device)
    decoder = Decoder(whisper, hidden, ids.shape[1], lengths)
    state = decoder(ids)
    prompt = ids[:, : len(prompts[0])]
    silence = no_speech_probability(decoder.logits(state[:, _start(whisper, prompt)]), whisper.generation_config)
    answers = torch.cat([ids[:, prompt.shape[1] :], ids.new_full((len(ids), 1), end)], dim=1)
    asked = state[:, prompt.shape[1] - 1 :]
    log_probs = token_log_probs(decoder, asked.flatten(0, 1), answers.flatten()).view(answers.shape).tolist()
    return [
        Decoded(list(text), found[: len(text) + 1], quiet)
        for text, found, quiet in zip(texts, log_probs, silence, strict=True)
    ]


def token_log_probs(decoder: Decoder, state: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """[tokens]: log-probability of each of answers [tokens] at hidden states [tokens, d_model]. Bounded in memory."""
    parts = []
    for begin in range(0, len(state), LOGIT_ROWS):
        logits = decoder.logits(state[begin : begin + LOGIT_ROWS])
        wanted = answers[begin : begin + LOGIT_ROWS, None]
        parts.append(logits.gather(1, wanted)[:, 0] - logits.logsumexp(-1))
    return torch.cat(parts)


def no_speech_probability(logits: torch.Tensor, stock: Any) -> list[float | None]:
    """Of each row, from the logits [rows, vocabulary] at `<|startoftranscript|>`, as openai/whisper's decoding.py reads it.

    The token of silence stands before `<|notimestamps|>` in all of Whisper's vocabularies.
    """
    no_timestamps = getattr(stock, "no_timestamps_token_id", None)
    if no_timestamps is None:
        return [None] * len(logits)
    return (logits[:, no_timestamps - 1] - logits.logsumexp(-1)).exp().tolist()


def _start(whisper: Any, prompt: torch.Tensor) -> int:
    """Where `<|startoftranscript|>` stands in prompts, which are alike but for the language."""
    return prompt[0].tolist().index(whisper.generation_config.decoder_start_token_id)


def _ids(tokens: Sequence[int] | None, vocabulary: int, device: torch.device) -> torch.Tensor:
    return torch.tensor([t for t in tokens or () if 0 <= t < vocabulary], dtype=torch.long, device=device)


def _time_rules(stock: Any, prompt_length: int) -> Processor:
    rules = GenerationConfig(
        no_timestamps_token_id=stock.no_timestamps_token_id,
        eos_token_id=stock.eos_token_id,
        bos_token_id=stock.bos_token_id,
        max_initial_timestamp_index=getattr(stock, "max_initial_timestamp_index", None),
    )
    return WhisperTimeStampLogitsProcessor(rules, begin_index=prompt_length)  # type: ignore[no-any-return]
