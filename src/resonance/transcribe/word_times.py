"""When each token is said, from the decoder's cross-attention (openai/whisper, `timing.py`), at any audio context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from resonance.transcribe.decoding import Decoder
from resonance.units import POSITIONS_PER_SECOND

MEDIAN_WIDTH = 7  # tokens' attention is smoothed over so many positions: 0.14 s


@torch.inference_mode()
def token_starts(
    whisper: Any,
    hidden: torch.Tensor,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    seconds: Sequence[float],
    lengths: Sequence[int] | None = None,
) -> list[list[float]]:
    """Seconds at which each token of each text begins, and the last one ends: one more than tokens.

    hidden: [rows, positions, d_model]; prompts: equally long, with `<|notimestamps|>`; texts: without timestamps; seconds:
    of each clip, without the silence behind it, in which nothing can be said; lengths: positions of each row, where the
    others only fill up.
    """
    longest = max(map(len, texts))
    end = whisper.generation_config.eos_token_id
    rows = [[*prompt, *text, *[end] * (longest - len(text))] for prompt, text in zip(prompts, texts, strict=True)]
    ids = torch.tensor(rows, device=hidden.device)
    decoder = Decoder(whisper, hidden, ids.shape[1], lengths)
    heads = alignment_heads(whisper)
    with attended(whisper, sorted({layer for layer, _head in heads})) as queries:
        decoder(ids)
    first = len(prompts[0]) - 1  # the state at `<|notimestamps|>` looks for the first token
    found = []
    for row, (text, length) in enumerate(zip(texts, seconds, strict=True)):
        positions = min(max(round(length * POSITIONS_PER_SECOND), 1), lengths[row] if lengths else hidden.shape[1])
        asked = slice(0, first + len(text) + 1)
        scores = [
            queries[layer][row, head, asked].float() @ decoder.heard[layer][0][row, head, :positions].float().T
            for layer, head in heads
        ]
        found.append(_starts(torch.stack(scores), first))
    return found


def _starts(scores: torch.Tensor, first: int) -> list[float]:
    """From attention scores [heads, tokens, positions] of prompt and text, of which those from row `first` on are aligned.

    A position's weights are compared over all tokens: those of the prompt show what nobody listens to.
    """
    weights = scores.softmax(-1)
    spread, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    weights = (weights - mean) / spread.clamp(min=1e-9)
    if weights.shape[-1] > MEDIAN_WIDTH // 2:
        side = MEDIAN_WIDTH // 2
        padded = torch.nn.functional.pad(weights, (side, side), mode="reflect")
        weights = padded.unfold(-1, MEDIAN_WIDTH, 1).median(-1).values
    tokens, positions = best_path(-weights.mean(0)[first:].double().cpu().numpy())
    first_of_token = np.flatnonzero(np.diff(tokens, prepend=-1))
    return [float(position) / POSITIONS_PER_SECOND for position in positions[first_of_token]]


def best_path(cost: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Dynamic time warping: the cheapest way through cost [rows, columns] from one corner to the other, as the rows and
    columns it passes.

    Each step goes on by one row, one column or both. Computed one diagonal at a time, whose cells do not need each other.
    """
    rows, columns = cost.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    came = np.zeros((rows + 1, columns + 1), np.int8)  # 0: both, 1: row, 2: column
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        ways = np.stack([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]])
        best = ways.argmin(0)
        total[i, j] = cost[i - 1, j - 1] + ways[best, np.arange(len(i))]
        came[i, j] = best
    came[0, :], came[:, 0] = 2, 1
    i, j, path = rows, columns, []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        step = came[i, j]
        i, j = i - (step != 2), j - (step != 1)
    found = np.array(path[::-1], dtype=np.intp)
    return found[:, 0], found[:, 1]


def alignment_heads(whisper: Any) -> list[tuple[int, int]]:
    """(layer, head) of the cross-attention that follows the speech: those the checkpoint names, else all heads of the
    upper half of the decoder, as in openai/whisper's model.py."""
    known = getattr(whisper.generation_config, "alignment_heads", None)
    layers, heads = whisper.config.decoder_layers, whisper.config.decoder_attention_heads
    if known and all(layer < layers and head < heads for layer, head in known):
        return [(layer, head) for layer, head in known]
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]


@contextlib.contextmanager
def attended(whisper: Any, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """What the cross-attention of these layers asks for inside the block: layer to queries [rows, heads, tokens, width]."""
    found: dict[int, torch.Tensor] = {}

    def remember(layer: int, attention: Any, output: torch.Tensor) -> None:
        found[layer] = (output * attention.scaling).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)

    hooks = []
    for layer in layers:
        attention = whisper.model.decoder.layers[layer].encoder_attn
        hooks.append(
            attention.q_proj.register_forward_hook(
                lambda _module, _inputs, output, layer=layer, attention=attention: remember(layer, attention, output)
            )
        )
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
