"""A person's phrase list: the phrases nearest to a clip by the model's own probability, beside what it wrote freely.

Each phrase is looked for in the spellings that Whisper may write it in (first letter, end mark, Chinese script). They make
one trie of tokens, whose nodes are scored level by level with the encoder's output computed once; a beam keeps the best of
each level, so ten thousand phrases cost about as much as a hundred. What is compared is the mean log-probability over the
tokens and the end of the text. The sum prefers short phrases: with severe dysarthria each token of a sentence costs more
than a wrong word (F01, M01, M03 and M04 of TORGO: the nearest phrase is right for 45 % by the sum, 51 % by the mean).
benchmarks/phrases.py measures what it is worth.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from resonance.data.textfile import lines, read_text
from resonance.data.tokens import LabelTokenizer
from resonance.errors import DataError
from resonance.messages import _
from resonance.transcribe.decoding import Speaking, one_voice

if TYPE_CHECKING:
    from opencc import OpenCC

BEAM = 16  # trie nodes kept at each level; with 24 the same phrases were the nearest, at twice the time
BEAM_NATS = 10.0  # a node so much less probable than the best of its level is dropped
MARGIN = 2.0  # mean log-probability that a node must still be able to reach, below the best phrase so far
# Chosen together, among 2 to 6 and 0 to 2, on 315 recordings of four speakers of TORGO, each with its phrase on the list and
# off it: sharper, the score was less honest (Brier 0.13 here, 0.17 to 0.25 with 3 to 6); with a bias of 2, 50 % instead of
# 46 % became the right phrase, but of what is off the list 20 % instead of 11 % passed a threshold of 0.5.
SHARPNESS = 2.0  # of the probability among phrases, per nat of mean log-probability
BIAS = 1.0  # nats a token that a phrase may be behind the free text, at weight 1
ROWS_AT_ONCE = 16  # clips scored together
STATES_AT_ONCE = 256  # decoder states whose probabilities over the vocabulary are in memory together, 4 bytes each
CHINESE = frozenset({"zh", "yue"})
END_MARKS = " .,;:!?…。，、；：！？"


@dataclass(frozen=True, slots=True)
class PhraseChoice:
    """What a clip is, given the phrases."""

    text: str  # the phrase as the list spells it, the free text, or "" where only phrases may be answered
    phrase: str | None  # the phrase of the list that `text` is
    score: float  # 0-1: probability of the nearest phrase, beside the other phrases and none of them
    ids: list[int]  # tokens of `text` as the model would write it, for the times of its words


@dataclass(frozen=True, eq=False)
class PhraseHelp:
    """What this person says, and how much it counts.

    weight: a phrase is taken in place of the free text while its mean log-probability is at most BIAS * weight below the
    free text's; 0 takes the free text always. only: answer with a phrase or with "" where its score is below `threshold`.
    """

    phrases: tuple[str, ...]
    weight: float = 1.0
    only: bool = False
    threshold: float = 0.5
    _tries: dict[tuple[Any, str | None], PhraseTrie] = field(default_factory=dict, repr=False)

    def trie(self, tokenizer: LabelTokenizer, language: str | None) -> PhraseTrie:
        """The phrases in the tokens of a model and a language, made once for each.

        Raises DataError with the first phrase that is too long for the decoder.
        """
        key = (tokenizer.tokenizer, language)
        if key not in self._tries:
            self._tries[key] = PhraseTrie.of(self.phrases, tokenizer, language)
        return self._tries[key]

    @functools.cached_property
    def by_key(self) -> dict[str, int]:
        """Phrase numbers by `spoken`."""
        return {spoken(phrase): i for i, phrase in reversed(list(enumerate(self.phrases)))}


def read_phrases(path: Path) -> tuple[str, ...]:
    """The phrases of a text file, one a line, each once: of two that differ in case or marks only, the first.

    Raises ManifestError when the file cannot be read or is not UTF-8, DataError when it has no phrase.
    """
    found: dict[str, str] = {}
    for line in lines(read_text(path)):
        phrase = " ".join(line.split())
        if key := spoken(phrase):
            found.setdefault(key, phrase)
    if not found:
        raise DataError(_("{path}: no phrases in it. Write one phrase a line.").format(path=path))
    return tuple(found.values())


def spoken(text: str) -> str:
    """What two spellings of the same phrase have in common: no case, no marks, no spaces, Simplified Chinese."""
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c for c in folded if unicodedata.category(c)[0] not in "PSZC")
    return kept if kept.isascii() else _opencc("t2s").convert(kept)


@functools.cache
def _opencc(table: str) -> OpenCC:
    from opencc import OpenCC

    return OpenCC(table)


def spellings(phrase: str, language: str | None) -> Iterator[str]:
    """How Whisper may write a phrase: as given, other first letter, no or another end mark; Chinese in both scripts."""
    stem = phrase.rstrip(END_MARKS) or phrase
    stems = [stem, stem[0].upper() + stem[1:], stem[0].lower() + stem[1:]]
    if language in CHINESE:
        stems += [_opencc(table).convert(stem) for table in ("s2t", "t2s")]
    stop = "。" if language in CHINESE or language == "ja" else "."
    seen = set()
    for text in [phrase, *(stem + end for stem in stems for end in ("", stop, phrase[len(stem) :]))]:
        if text not in seen:
            seen.add(text)
            yield text


@dataclass(frozen=True, slots=True)
class PhraseTrie:
    """Token sequences as a tree. Node 0 is the root; arrays int64 [nodes], `first` [nodes + 1]."""

    tokens: np.ndarray
    phrase: np.ndarray  # number of the phrase that ends here, else -1
    longest: np.ndarray  # tokens of the longest phrase through this node
    first: np.ndarray  # children[first[n] : first[n + 1]] are the children of n
    children: np.ndarray

    @staticmethod
    def of(phrases: Sequence[str], tokenizer: LabelTokenizer, language: str | None) -> PhraseTrie:
        most = tokenizer.max_label_tokens - len(tokenizer.prompt(language)) - 1
        edges: dict[tuple[int, int], int] = {}
        parents, tokens, ends, longest = [0], [0], [-1], [0]
        for number, phrase in enumerate(phrases):
            for spelling in spellings(phrase, language):
                ids = tokenizer.text_ids(spelling, language)
                if len(ids) > most:
                    raise DataError(
                        _("The phrase “{phrase}” is {found} tokens long; the model holds {most}. Shorten it.").format(
                            phrase=phrase[:40] + "…", found=len(ids), most=most
                        )
                    )
                node = 0
                for token in ids:
                    child = edges.setdefault((node, token), len(parents))
                    if child == len(parents):
                        parents.append(node)
                        tokens.append(token)
                        ends.append(-1)
                        longest.append(0)
                    node = child
                    longest[node] = max(longest[node], len(ids))
                if ends[node] < 0:
                    ends[node] = number
        above = np.array(parents[1:], dtype=np.int64)
        order = np.argsort(above, kind="stable")
        return PhraseTrie(
            tokens=np.array(tokens),
            phrase=np.array(ends),
            longest=np.array(longest),
            first=np.searchsorted(above[order], np.arange(len(parents) + 1)),
            children=order + 1,
        )

    def below(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All children of `nodes`, and for each the index in `nodes` of its parent."""
        counts = self.first[nodes + 1] - self.first[nodes]
        parent = np.repeat(np.arange(len(nodes)), counts)
        place = np.arange(len(parent)) - np.repeat(np.cumsum(counts) - counts, counts)
        return parent, self.children[self.first[nodes][parent] + place]

    def ids(self, node: int, parents: np.ndarray) -> list[int]:
        """The tokens from the root to `node`."""
        path = []
        while node:
            path.append(int(self.tokens[node]))
            node = int(parents[node])
        return path[::-1]

    def parents(self) -> np.ndarray:
        """The parent of each node."""
        above = np.zeros(len(self.tokens), dtype=np.int64)
        above[self.children] = np.repeat(np.arange(len(self.tokens)), np.diff(self.first))
        return above


@dataclass(frozen=True, slots=True)
class Found:
    """A phrase in its best spelling for one clip."""

    mean_log_prob: float  # over its tokens and the end of the text
    node: int


@torch.inference_mode()
def search(
    whisper: Any, hidden: torch.Tensor, prompt: Sequence[int], trie: PhraseTrie, beam: int = BEAM
) -> list[dict[int, Found]]:
    """For each row of encoder output [rows, positions, d_model] the phrases that were followed to their end, by number.

    Exact while `beam` nodes of a level are enough; a node that is left out is less probable than `beam` others.
    """
    rows, device = len(hidden), hidden.device
    end = end_of_text(whisper)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    given = torch.tensor([list(prompt)] * rows, device=device)
    decoder = whisper.model.decoder
    states = decoder(given, encoder_hidden_states=hidden, past_key_values=cache, use_cache=True).last_hidden_state
    states = states[:, -1:]  # [rows, nodes of the level, d_model]
    visible = torch.ones((rows, 1, len(prompt)), dtype=torch.bool, device=device)  # [rows, nodes, cached tokens]
    row, slot = np.arange(rows), np.zeros(rows, dtype=np.int64)  # of each node of the level
    nodes, scores = np.zeros(rows, dtype=np.int64), np.zeros(rows)
    found: list[dict[int, Found]] = [{} for _row in range(rows)]
    best = np.full(rows, -np.inf)
    depth = 0
    while True:
        parent, child = trie.below(nodes)
        ends = np.flatnonzero(trie.phrase[nodes] >= 0)
        level = states[torch.from_numpy(row).to(device), torch.from_numpy(slot).to(device)]
        source = np.concatenate([parent, ends])
        token = np.concatenate([trie.tokens[child], np.full(len(ends), end)])
        reached = scores[source] + _log_probs(whisper, level, source, token)
        for i, total in zip(ends, reached[len(parent) :], strict=True):
            mean, number = float(total) / (depth + 1), int(trie.phrase[nodes[i]])
            known = found[row[i]].get(number)
            if known is None or mean > known.mean_log_prob:
                found[row[i]][number] = Found(mean, int(nodes[i]))
            best[row[i]] = max(best[row[i]], mean)
        reached = reached[: len(parent)]
        kept, rank = _beam(row[parent], reached, reached / (trie.longest[child] + 1) > best[row[parent]] - MARGIN, beam)
        if not len(kept):
            return found
        width = int(rank.max()) + 1
        into = np.zeros((2, rows, width), dtype=np.int64)  # token and parent's slot
        new_row = row[parent[kept]]
        into[0, new_row, rank] = trie.tokens[child[kept]]
        into[1, new_row, rank] = slot[parent[kept]]
        row, slot, nodes, scores = new_row, rank, child[kept], reached[kept]
        tokens, above = torch.from_numpy(into).to(device)
        own = torch.eye(width, dtype=torch.bool, device=device).expand(rows, width, width)
        visible = torch.cat([visible[torch.arange(rows, device=device)[:, None], above], own], dim=2)
        mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=device)
        states = decoder(
            tokens,
            attention_mask=mask.masked_fill(~visible, torch.finfo(hidden.dtype).min)[:, None],
            encoder_hidden_states=hidden,
            past_key_values=cache,
            position_ids=torch.full((rows, width), len(prompt) + depth, device=device),
            use_cache=True,
        ).last_hidden_state
        depth += 1


def _beam(row: np.ndarray, scores: np.ndarray, hopeful: np.ndarray, beam: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the best `beam` scores of each row among the hopeful, and the rank of each in its row."""
    top = np.full(int(row.max(initial=-1)) + 1, -np.inf)
    np.maximum.at(top, row, scores)
    kept = np.flatnonzero(hopeful & (scores > top[row] - BEAM_NATS))
    kept = kept[np.lexsort((-scores[kept], row[kept]))]
    rank = np.arange(len(kept)) - np.searchsorted(row[kept], row[kept])
    return kept[rank < beam], rank[rank < beam]


def _log_probs(whisper: Any, states: torch.Tensor, source: np.ndarray, token: np.ndarray) -> np.ndarray:
    """Log-probability of each token after states[source], float64. states: [n, d_model]."""
    values = np.empty(len(source))
    for first in range(0, len(states), STATES_AT_ONCE):
        logits = whisper.proj_out(states[first : first + STATES_AT_ONCE]).float()
        total = logits.logsumexp(dim=-1)
        part = np.flatnonzero((source >= first) & (source < first + STATES_AT_ONCE))
        at = torch.from_numpy(source[part] - first).to(states.device)
        values[part] = (logits[at, torch.from_numpy(token[part]).to(states.device)] - total[at]).cpu().numpy()
    return values


@torch.inference_mode()
def mean_log_probs(
    whisper: Any, hidden: torch.Tensor, prompt: Sequence[int], texts: Sequence[Sequence[int]]
) -> list[float]:
    """Mean log-probability of the tokens of each text and of its end, one text a row of hidden."""
    end, longest = end_of_text(whisper), max(map(len, texts))
    ids = [[*prompt, *text, *[end] * (longest - len(text))] for text in texts]
    states = whisper.model.decoder(
        torch.tensor(ids, device=hidden.device), encoder_hidden_states=hidden, use_cache=False
    ).last_hidden_state[:, len(prompt) - 1 :]
    lengths = np.array([len(text) + 1 for text in texts])
    flat = torch.cat([row[:length] for row, length in zip(states, lengths, strict=True)])
    wanted = np.array([token for text in texts for token in [*text, end]])
    values = _log_probs(whisper, flat, np.arange(len(wanted)), wanted)
    return [float(v) for v in np.add.reduceat(values, np.cumsum(lengths) - lengths) / lengths]


def end_of_text(whisper: Any) -> int:
    """The id of `<|endoftext|>`: all special tokens and times come behind it, all texts before."""
    end = whisper.generation_config.eos_token_id
    return int(end[0] if isinstance(end, list) else end)


def choose(found: dict[int, float], free: float, free_phrase: int | None, help: PhraseHelp) -> tuple[int | None, float]:
    """The phrase that the text is (None: none of them), and the probability of the nearest.

    found: mean log-probability by phrase; free: that of the free text; free_phrase: the phrase it spells, if any, which
    then is the nearest. The probability is a softmax of SHARPNESS * mean log-probability over the phrases and, unless it is
    one, the free text less the bias.
    """
    means = dict(found)
    if free_phrase is not None:
        means[free_phrase] = max(free, means.get(free_phrase, free))
    if not means:
        return None, 0.0
    nearest = max(means, key=lambda number: means[number]) if free_phrase is None else free_phrase
    none = free - BIAS * help.weight if free_phrase is None else -np.inf
    others = np.array([*means.values(), none])
    score = float(1 / np.exp(SHARPNESS * (others - means[nearest])).sum())
    taken = score >= help.threshold if help.only else means[nearest] >= none
    return (nearest if taken else None), score


def apply(
    whisper: Any,
    hidden: torch.Tensor,
    languages: Sequence[str | None],
    free: Sequence[tuple[str, Sequence[int]]],
    tokenizer: LabelTokenizer,
    help: PhraseHelp,
    speaking: Speaking = one_voice,
) -> list[PhraseChoice]:
    """What each clip is, given the phrases and what was decoded without them.

    whisper: WhisperForConditionalGeneration; hidden: encoder output [rows, positions, d_model]; free: text and tokens of each
    row, times and special tokens among them or not; speaking: puts the adapters of some of the rows in place.
    """
    end = end_of_text(whisper)
    if not help.weight and not help.only:
        return [PhraseChoice(text, None, 0.0, [token for token in ids if token < end]) for text, ids in free]
    choices: dict[int, PhraseChoice] = {}
    for language in dict.fromkeys(languages):
        trie = help.trie(tokenizer, language)
        parents = trie.parents()
        prompt = tokenizer.prompt(language)
        same = [i for i, other in enumerate(languages) if other == language]
        for first in range(0, len(same), ROWS_AT_ONCE):
            rows = same[first : first + ROWS_AT_ONCE]
            texts = [[token for token in free[i][1] if token < end] for i in rows]
            states = hidden[rows]
            with speaking(rows):
                means = mean_log_probs(whisper, states, prompt, texts)
                nearest = search(whisper, states, prompt, trie)
            for i, ids, mean, found in zip(rows, texts, means, nearest, strict=True):
                number, score = choose(
                    {n: f.mean_log_prob for n, f in found.items()}, mean, help.by_key.get(spoken(free[i][0])), help
                )
                if number is None:
                    choices[i] = PhraseChoice("" if help.only else free[i][0], None, score, [] if help.only else ids)
                else:
                    phrase = help.phrases[number]
                    ids = trie.ids(found[number].node, parents) if number in found else ids
                    choices[i] = PhraseChoice(phrase, phrase, score, ids)
    return [choices[i] for i in range(len(free))]
