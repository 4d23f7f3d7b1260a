"""Share of a training step that waits for data: `resonance train` with 2 workers, whisper-tiny's shape, clips from disk.

    python benchmarks/loader.py
    python benchmarks/loader.py --finetuning lora --epochs 3

The number is the `data_wait` that every training logs in events.jsonl, averaged over its steps by their time. To check that
meter, the time between steps is measured from outside too: time in which no step ran is printed beside it and holds the
wait, the log and what else lies between two steps. What the workers take from the cores that the model computes on is a
cost of its own; their processor time is printed too. The last line is `data_wait X.XX%`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import made_up


def main() -> None:
    given = arguments()
    os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryDirectory() as folder:
        values = measure(given, Path(folder))
    machine.report({"settings": machine.settings(given), **values}, given.out)
    print(f"{values['steps']} steps of {given.batch} clips, {values['seconds_a_step']:.2f} s each")
    print(f"the workers used {values['worker_cpu_seconds_a_step']:.3f} s of processor time a step")
    print(f"no step ran in {values['outside_steps_percent']:.2f}% of the time")
    print(f"data_wait {values['data_wait_percent']:.2f}%")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder of a Whisper checkpoint; left out, random weights of whisper-tiny's shape"
    )
    parser.add_argument("--data", type=Path, help="recordings and transcripts; left out, clips are made up")
    parser.add_argument("--language", default="en")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the made-up clips")
    parser.add_argument("--clips", type=int, default=80, help="how many clips are made up")
    parser.add_argument("--epochs", type=int, default=2, help="each starts its workers anew, which counts as waiting")
    parser.add_argument("--finetuning", choices=("full", "lora"), default="full")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    if given.data is None and given.clips <= given.batch:
        sys.exit("--clips must be more than --batch: the first step is not measured.")
    return given


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import resource

    from rich.console import Console
    from transformers import TrainerCallback, trainer

    from resonance.config import TrainConfig
    from resonance.finetune import finetune

    class Steps(TrainerCallback):  # type: ignore[misc]
        """When each step began and ended."""

        def __init__(self) -> None:
            self.began: list[float] = []
            self.ended: list[float] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began.append(time.perf_counter())

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ended.append(time.perf_counter())

    steps = Steps()
    trainer.DEFAULT_CALLBACKS.append(steps)
    config = TrainConfig.model_validate(
        {
            "model_name_or_path": given.model or str(made_up.write_model(folder / "model")),
            "train_file": given.data or made_up.write_clips(folder / "clips", given.clips, given.seconds, seed=0),
            "validation_split": 0.0,
            "language": given.language,
            "finetuning": given.finetuning,
            "num_train_epochs": given.epochs,
            "per_device_train_batch_size": given.batch,
            "dataloader_num_workers": given.workers,
            "logging_steps": 1,
            "output_dir": folder / "run",
        }
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finetune(config, Console(quiet=True))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    workers = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = (folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "data_wait" in row][1:]  # the first step starts the workers
    seconds = [given.batch / row["samples_per_second"] for row in rows]
    waited = sum(row["data_wait"] * s for row, s in zip(rows, seconds, strict=True))
    inside = sum(end - begin for begin, end in zip(steps.began[1:], steps.ended[1:], strict=True))
    outside = 1 - inside / (steps.ended[-1] - steps.ended[0])
    return {
        "steps": len(steps.ended),
        "seconds_a_step": round((steps.ended[-1] - steps.ended[0]) / (len(steps.ended) - 1), 3),
        "worker_cpu_seconds_a_step": round(workers / len(steps.ended), 3),
        "data_wait_percent": round(100 * waited / sum(seconds), 2),
        "outside_steps_percent": round(100 * outside, 2),
    }


if __name__ == "__main__":
    main()
