"""Many LoRA adapters in one batch: each row of a batch goes through the adapter of the person who speaks in it.

PEFT can do that too (`adapter_names`), with two faults that matter here: an exception leaves its hooks behind, so that a
later call answers with another person's adapter (peft issue 3475), and loading takes longer with each adapter there is.
Here a linear layer asks one object which adapters are in place; a block puts them there and always takes them away again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from resonance.model.lora_weights import LoadedAdapter

# Up to so many tokens a row, all rows go through one padded product, for which their adapters are copied into one tensor once
# a batch: with 16 adapters and one token that takes 0.56 of the time of a product for each (384 wide, one core). From 16 tokens
# on both take the same time, and nothing has to be copied.
FEW_TOKENS = 15

# A and B: [rank, in] and [out, rank], or [rows, rank, in] and [rows, out, rank]
Pair = tuple[torch.Tensor, torch.Tensor]


class Mixture:
    """Which adapter each row of the batch under way goes through. Belongs to one model, and to one thread."""

    def __init__(self) -> None:
        self.rows: tuple[LoadedAdapter | None, ...] = ()
        self.alike = True  # all rows have the same adapter, or none
        self._stacked: dict[str, Pair] = {}

    @contextlib.contextmanager
    def speaking(self, rows: Sequence[LoadedAdapter | None]) -> Iterator[None]:
        """Inside the block, row i of every batch goes through `rows[i]`; None is the base model.

        Outside there are no adapters, whatever happens inside.
        """
        before, stacked = self.rows, self._stacked
        self._put(tuple(rows), {})
        try:
            yield
        finally:
            self._put(before, stacked)

    def keep(self, kept: torch.Tensor) -> None:
        """The batch goes on with these rows only, until the end of the block."""
        if self.rows:
            stacked = {name: (a[kept], b[kept]) for name, (a, b) in self._stacked.items()}
            self._put(tuple(self.rows[row] for row in kept.tolist()), stacked)

    def _put(self, rows: tuple[LoadedAdapter | None, ...], stacked: dict[str, Pair]) -> None:
        self.rows, self._stacked = rows, stacked
        self.alike = all(adapter is rows[0] for adapter in rows)

    def groups(self) -> Iterator[tuple[int, int, LoadedAdapter | None]]:
        """Rows from the first to before the second that have the same adapter."""
        first = 0
        for row in range(1, len(self.rows) + 1):
            if row == len(self.rows) or self.rows[row] is not self.rows[first]:
                yield first, row, self.rows[first]
                first = row

    def stacked(self, name: str, like: nn.Linear) -> Pair | None:
        """The updates of one layer for all rows, zero where a row has none. None: no row has any."""
        if name not in self._stacked:
            pairs = [adapter.layers.get(name) if adapter else None for adapter in self.rows]
            ranks = [len(pair[0]) for pair in pairs if pair]
            if not ranks:
                return None
            a = like.weight.new_zeros(len(pairs), max(ranks), like.in_features)
            b = like.weight.new_zeros(len(pairs), like.out_features, max(ranks))
            for row, pair in enumerate(pairs):
                if pair:
                    rank = len(pair[0])
                    a[row, :rank], b[row, :, :rank] = pair
            self._stacked[name] = a, b
        return self._stacked[name]


class MixedLinear(nn.Module):
    """A linear layer whose rows have each an update of their own."""

    def __init__(self, name: str, base: nn.Linear, mixture: Mixture) -> None:
        super().__init__()
        self.name, self.base, self.mixture = name, base, mixture

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [rows * n, tokens, in], the n beams of a row next to each other. Returns [rows * n, tokens, out]."""
        y: torch.Tensor = self.base(x)
        rows = len(self.mixture.rows)
        if not rows:
            return y
        if x.shape[0] % rows:
            raise RuntimeError(f"a batch of {x.shape[0]} where adapters are in place for {rows} rows")
        per_row = x.shape[0] // rows
        if self.mixture.alike or x.shape[1] * per_row > FEW_TOKENS:
            for start, end, adapter in self.mixture.groups():
                pair = adapter.layers.get(self.name) if adapter else None
                if pair:
                    a, b = pair
                    part = slice(start * per_row, end * per_row)
                    y[part].flatten(0, 1).addmm_(x[part].flatten(0, 1) @ a.T, b.T)
        elif pair := self.mixture.stacked(self.name, self.base):
            a, b = pair
            into = y.view(rows, per_row * y.shape[1], y.shape[2])
            into.baddbmm_(x.reshape(rows, per_row * x.shape[1], x.shape[2]) @ a.mT, b.mT)
        return y

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight


def make_mixable(whisper: Any) -> tuple[Mixture, dict[str, tuple[int, int]]]:
    """Let the linear layers of a WhisperForConditionalGeneration take adapters. Without one they compute as before.

    Returns what says which rows take which, and the (in, out) of each layer by its name.
    """
    mixture = Mixture()
    shapes = {}
    for name, module in list(whisper.named_modules()):
        if isinstance(module, nn.Linear) and name != "proj_out":
            whisper.set_submodule(name, MixedLinear(name, module, mixture))
            shapes[name] = module.in_features, module.out_features
    whisper.mixture = mixture
    return mixture, shapes


def keep_rows(whisper: Any, kept: torch.Tensor) -> None:
    """Tell a model that may have several adapters in place that its batch goes on with these rows only."""
    mixture: Mixture | None = getattr(whisper, "mixture", None)
    if mixture:
        mixture.keep(kept)
