"""`resonance curve`: the same training on 10, 30, 50, 100 recordings, each measured on the same held-out ones.

What it tells a family is whether recording more is worth the effort.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from resonance.config import CurveConfig, TrainConfig
from resonance.config_recognizer import EvaluateConfig
from resonance.data.writing import write_manifest
from resonance.errors import ConfigError
from resonance.evaluate.curve import Point, write_curve
from resonance.evaluate.evaluation import evaluate
from resonance.finetune import finetune
from resonance.messages import _
from resonance.plan.command import planned
from resonance.train.rows import read_rows
from resonance.transcribe.recognizer import DecodeSettings


def learning_curve(config: CurveConfig, console: Console) -> tuple[list[Point], Path]:
    """Train and measure every size. Returns the points, smallest first, and the page that shows them.

    The recordings of a smaller training are part of every larger one, in a random order. A curve that was stopped goes on
    where it stopped when the same command is given again.
    """
    if config.auto:  # once, for all sizes
        config = planned(config, console)
    rows = read_rows(config, console)
    if not rows.held_out:
        raise ConfigError([_("A curve needs recordings to measure on. Give --validation_file or --validation_split.")])
    pool = list(rows.train)
    random.Random(config.seed).shuffle(pool)
    data = config.output_dir / "data"
    data.mkdir(parents=True, exist_ok=True)
    test_file = data / "test.json"
    write_manifest(test_file, rows.held_out)
    points, known_base = [], dict[DecodeSettings, list[str]]()
    for size in usable_sizes(config.sizes, len(pool)):
        console.print(_("Training on {count} recordings").format(count=size), style="bold")
        train_file = data / f"train-{size}.json"
        write_manifest(train_file, pool[:size])
        folder = config.output_dir / f"{size}"
        finetune(one_training(config, train_file, test_file, folder), console)
        settings = {"model_path": str(folder), "test_file": test_file, "train_file": train_file, "seed": config.seed}
        report, _folder = evaluate(EvaluateConfig.model_validate(settings), console, known_base)
        points.append(Point(size, report))
    return points, write_curve(config.output_dir, _("More recordings, more understood?"), points)


def usable_sizes(sizes: Sequence[int], available: int) -> list[int]:
    """The sizes that there are recordings for, and all of them in place of those that would need more."""
    return sorted({min(size, available) for size in sizes})


def one_training(config: CurveConfig, train_file: Path, test_file: Path, folder: Path) -> TrainConfig:
    """The settings of one point. Nothing is chosen on the held-out recordings: they are what it is measured on."""
    values = config.model_dump(exclude={"sizes", "dataset_dir", "json_file", "max_train_samples", "max_eval_samples"})
    shared = (
        config.feature_cache_dir or config.output_dir / "features"
    )  # every size hears the recordings of the smaller ones
    cache = None if config.feature_cache == "none" else shared
    return TrainConfig.model_validate(
        values
        | {
            "train_file": train_file,
            "output_dir": folder,
            "validation_file": test_file,
            "validation_split": 0.0,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "early_stopping_patience": None,
            "resume": folder.exists(),
            "feature_cache_dir": cache,
        }
    )
