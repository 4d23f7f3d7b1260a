"""One training through the product's own parts, for tests: in this process, or as one of several ranks.

As a script it is a rank: `training.py CONFIG.json OUT.safetensors`, with torchrun's RANK, WORLD_SIZE and MASTER_* set.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from transformers import set_seed

from resonance.config import TrainConfig
from resonance.data.audio_context import AudioContext
from resonance.data.tokens import LabelTokenizer
from resonance.model.runs import RunFolder
from resonance.ranks import ranks
from resonance.train import build
from resonance.train.rows import read_rows
from resonance.train.trainer import WhisperTrainer

torch.set_num_threads(1)  # a step takes milliseconds; threads that wait for a busy core make it a second

# Gradient steps of one size, so that a difference between gradients is a difference between weights.
PLAIN = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 1e9,
    "lora_dropout": 0.0,
    "lora_r": 4,
    "validation_split": 0.0,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
    "language": "en",
    "extra": {"use_cpu": True},
}


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    gradient_norms: list[float]
    weights: dict[str, torch.Tensor]  # of what is trained

    @classmethod
    def of(cls, trainer: WhisperTrainer) -> Trained:
        rows = [row for row in trainer.state.log_history if "loss" in row]
        model = trainer.accelerator.unwrap_model(trainer.model)
        weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        return cls([row["loss"] for row in rows], [row["grad_norm"] for row in rows], weights)


def settings(labels: Path, model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    base = {"train_file": str(labels), "model_name_or_path": str(model), "output_dir": str(out)}
    return base | PLAIN | {"max_steps": 1} | changes


def trainer_for(given: dict[str, Any]) -> WhisperTrainer:
    """The trainer that `resonance train` would build, with an adapter that is not zero to begin with."""
    config = TrainConfig.model_validate(given)
    run = RunFolder(config.output_dir)
    run.path.mkdir(parents=True, exist_ok=True)
    rows = read_rows(config, Console(quiet=True))
    whisper = build.load_base(config, torch.device("cpu"))
    tokenizer = LabelTokenizer(whisper.tokenizer, whisper.multilingual, "en", config.task, whisper.max_label_tokens)
    set_seed(config.seed)
    model = build.choose_weights(whisper, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    context = AudioContext(config.audio_context, config.audio_margin, whisper.window_positions)
    return build.build_trainer(config, run, rows, whisper, model, tokenizer, context, "en", ranks())


def train(given: dict[str, Any]) -> Trained:
    trainer = trainer_for(given)
    trainer.train()
    return Trained.of(trainer)


def main(config: str, out: str) -> None:
    trainer = trainer_for(json.loads(Path(config).read_text(encoding="utf-8")))
    trainer.train()
    done = Trained.of(trainer)
    if trainer.is_world_process_zero():
        logs = {"losses": torch.tensor(done.losses), "gradient_norms": torch.tensor(done.gradient_norms)}
        save_file({**logs, **{f"weights.{name}": w.contiguous() for name, w in done.weights.items()}}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
