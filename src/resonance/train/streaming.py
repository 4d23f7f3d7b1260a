"""A stream behind Trainer: batches from the workers, and where they stand, saved with each checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from resonance.config import TrainConfig
from resonance.data.clip_stream import Batch, ClipStream, Layout, Progress, step_loader
from resonance.data.stream import Position, Standing
from resonance.data.textfile import write_text_atomic
from resonance.errors import ConfigError, RunFolderError
from resonance.messages import _


def layout_of(config: TrainConfig, *, rank: int, ranks: int) -> Layout:
    return Layout(
        config.seed,
        rank,
        ranks,
        config.dataloader_num_workers,
        config.gradient_accumulation_steps,
        config.per_device_train_batch_size,
        config.shuffle_buffer,
    )


class StreamLoader:
    """What Trainer iterates over, without a length and without end.

    Workers read ahead; what they have read and Trainer has not trained on is read again after a stop. So the place of a
    worker is the one that came with its last batch, and it counts when the optimiser step is done.
    """

    def __init__(self, stream: ClipStream, fingerprint: str) -> None:
        self.dataset = stream
        self.fingerprint = fingerprint
        self.trained = Progress()
        self.taken = Progress()

    def __iter__(self) -> Iterator[Batch]:
        self.dataset.begun = copy.deepcopy(self.trained)
        for step in step_loader(self.dataset, pin_memory=torch.cuda.is_available()):
            self.taken.steps += 1
            self.taken.standings[step.reader] = step.standing
            yield from step.batches

    def step_done(self) -> None:
        self.trained = copy.deepcopy(self.taken)

    @property
    def readers(self) -> int:
        """Of all ranks."""
        return self.dataset.layout.readers * self.dataset.layout.ranks

    @property
    def left_out(self) -> int:
        """Recordings that were read and not trained on, counted anew in each epoch."""
        return sum(standing.left_out for standing in self.trained.standings.values())

    @property
    def epoch(self) -> int:
        """The pass through the data that the slowest of this rank's readers is in."""
        return min((standing.start.epoch for standing in self.trained.standings.values()), default=0)

    def save(self, checkpoint: Path) -> None:
        """Write where this rank's readers stand into `checkpoint`."""
        standings = {str(reader): standing for reader, standing in self.trained.standings.items()}
        values = {"steps": self.trained.steps, "standings": standings, "made_of": self._made_of()}
        checkpoint.mkdir(parents=True, exist_ok=True)  # rank 0 may not have come so far
        write_text_atomic(checkpoint / self._file(), [json.dumps(values, indent=1) + "\n"])

    def restore(self, checkpoint: Path | None) -> None:
        """Go on where `checkpoint` was written, or begin. Raises ConfigError where other processes read now."""
        self.trained = Progress()
        if checkpoint:
            path = checkpoint / self._file()
            try:
                values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                values = {"made_of": self._told(checkpoint)}
            self._refuse_other(checkpoint, values["made_of"])
            standings = {int(reader): _standing(value) for reader, value in values["standings"].items()}
            self.trained = Progress(values["steps"], standings)
        self.taken = copy.deepcopy(self.trained)

    def _file(self) -> str:
        return f"stream-{self.dataset.layout.rank}.json"

    def _told(self, checkpoint: Path) -> dict[str, Any]:
        """What rank 0 says of the layout, where this rank's file is missing because there were fewer ranks."""
        try:
            found: dict[str, Any] = json.loads((checkpoint / "stream-0.json").read_text(encoding="utf-8"))["made_of"]
        except (OSError, ValueError, KeyError) as error:
            raise RunFolderError(
                _("{path}: does not say where its stream was, so it cannot be continued.").format(path=checkpoint)
            ) from error
        return found

    def _made_of(self) -> dict[str, Any]:
        """Everything but the data that the order depends on. Batch and accumulation may change, their product not."""
        layout = asdict(self.dataset.layout)
        del layout["rank"]
        layout["group"] = layout.pop("batch") * layout.pop("accumulation")
        layout["workers"] = max(layout["workers"], 1)  # none and one read the same
        return {**layout, "data": self.fingerprint}

    def _refuse_other(self, checkpoint: Path, before: dict[str, Any]) -> None:
        names = {
            "ranks": _("number of processes (GPUs)"),
            "workers": "--dataloader_num_workers",
            "seed": "--seed",
            "buffer": "--shuffle_buffer",
            "group": "--per_device_train_batch_size x --gradient_accumulation_steps",
            "data": _("data"),
        }
        now = self._made_of()
        lines = [
            _("  {name}: {before} before, {now} now").format(name=shown, before=before.get(name), now=now[name])
            for name, shown in names.items()
            if before.get(name) != now[name]
        ]
        if lines:
            head = _(
                "{path}: its stream cannot be continued at the next recording, because what decides the order has changed. "
                "Continue with the old values:"
            ).format(path=checkpoint)
            raise ConfigError(["\n".join([head, *lines])])


class Taken(TrainerCallback):  # type: ignore[misc]
    """Counts a step's recordings as trained on when the step is done, and tells which pass it is."""

    def __init__(self, stream: StreamLoader) -> None:
        self.stream = stream

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stream.step_done()
        state.epoch = float(self.stream.epoch)  # Trainer's own begins at zero after each stop


def _standing(value: list[Any]) -> Standing:
    start, done, left_out = value
    return Standing(Position(*start), done, left_out)
