"""A training in a process of its own, for `test_crash.py`: a module that the new process can import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from resonance.config import TrainConfig
from resonance.finetune import finetune


def train(given: dict[str, Any], output: str) -> None:
    """`given` are the settings; what is printed goes to the end of the file `output`."""
    torch.set_num_threads(1)
    with Path(output).open("a", encoding="utf-8") as stream:
        finetune(TrainConfig.model_validate(given), Console(file=stream, width=200))
