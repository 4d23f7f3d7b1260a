"""Does the memory of a training grow with the data, and how does it compare with preparing all features first?

    python benchmarks/host_memory.py --out benchmarks/results/host_memory.json      about 10 minutes on two cores

1. `resonance train` on lists of 1,000 and of 100,000 rows (over the same few files), equally many steps: the largest
   proportional set size of the process and its workers, sampled from outside. Rows are read, checked and shuffled in full.
2. The recipe of many projects: `dataset.map` computes the features of every clip before the first step, one worker, every clip
   30 s long. Against `resonance train` on the same clips, in turn: memory, and clips a second from start to end.

The last line is `difference N MiB`, between the two lists. Nothing else should run. Needs the package `datasets`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

import machine
import made_up

SAMPLE_SECONDS = 0.25
FILES = 64
QUIET = {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a checkpoint; left out, random weights of whisper-tiny's shape")
    parser.add_argument("--rows", default="1000,100000", help="lengths of the two lists")
    parser.add_argument("--clips", type=int, default=400, help="recordings of the comparison")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a clip")
    parser.add_argument("--steps", type=int, default=20, help="of each training; the comparison makes one pass")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="of resonance train; the recipe has one")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--part", choices=("prepare", "ours", "eager"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--labels", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part == "prepare":
        prepare(given)
    elif given.part:
        train(given)
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    small, large = (int(number) for number in given.rows.split(","))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_part("prepare", folder)
        lists = {}
        for rows in (small, large):
            lists[rows] = run_part("ours", folder, write_list(folder, rows, rows), steps=given.steps)
            print(f"{rows} rows: {lists[rows]['peak_mib']:.0f} MiB at most", flush=True)
        labels = write_list(folder, given.clips, given.clips)
        steps = -(-given.clips // given.batch)
        eager = run_part("eager", folder, labels, steps=steps)
        ours = run_part("ours", folder, labels, steps=steps)
    for title, found in (("all features first", eager), ("resonance train", ours)):
        found["clips_per_second"] = round(given.clips / found["seconds"], 3)
        print(
            f"{title}: {found['peak_mib']:.0f} MiB at most, {found['clips_per_second']:.2f} clips/s from start to end"
        )
    difference = lists[large]["peak_mib"] - lists[small]["peak_mib"]
    values = {
        "settings": {
            "rows": given.rows,
            "clips": given.clips,
            "seconds": given.seconds,
            "steps": given.steps,
            "batch": given.batch,
        },
        "lists": {str(rows): found for rows, found in lists.items()},
        "eager": eager,
        "ours": ours,
        "memory_saved_percent": round(100 * (1 - ours["peak_mib"] / eager["peak_mib"]), 1),
        "speed_ratio": round(ours["clips_per_second"] / eager["clips_per_second"], 2),
        "difference_mib": round(difference, 1),
    }
    machine.report(values, given.out)
    print(f"{values['memory_saved_percent']:.0f} % less memory, {values['speed_ratio']:.1f} times as fast")
    print(f"difference {difference:.0f} MiB")


def run_part(part: str, folder: Path, labels: Path | None = None, steps: int = 0) -> dict[str, Any]:
    """Run this script for one part in a process of its own: how long it took, and its memory with that of its workers."""
    command = [sys.executable, *sys.argv, "--part", part, "--folder", str(folder), "--labels", str(labels or folder)]
    if steps:
        command += ["--steps", str(steps)]
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, env=os.environ | QUIET)
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # one may just have ended
            # Proportional: a page that workers share with their parent counts once.
            peak = max(peak, sum(one.memory_full_info().pss for one in [watched, *watched.children(recursive=True)]))
        time.sleep(SAMPLE_SECONDS)
    if process.returncode:
        sys.exit(f"{part} ended with {process.returncode}")
    return {"peak_mib": round(peak / (1 << 20), 1), "seconds": round(time.perf_counter() - began, 2)}


def prepare(given: argparse.Namespace) -> None:
    if given.model is None:
        made_up.write_model(given.folder / "model")
    made_up.write_clips(given.folder, max(FILES, given.clips), given.seconds, seed=0)


def write_list(folder: Path, rows: int, files: int) -> Path:
    """A JSON list of so many rows over the made-up clips."""
    known = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    path = folder / f"rows_{rows}.json"
    chosen = [known[i % min(files, len(known))] | {"text": f"{known[i % len(known)]['text']} {i}"} for i in range(rows)]
    path.write_text(json.dumps(chosen), encoding="utf-8")
    return path


def train(given: argparse.Namespace) -> None:
    from rich.console import Console

    from resonance.config import TrainConfig
    from resonance.finetune import finetune

    config = TrainConfig.model_validate(
        {
            "model_name_or_path": given.model or str(given.folder / "model"),
            "train_file": given.labels,
            "validation_split": 0.0,
            "language": "en",
            "finetuning": "full",
            "max_steps": given.steps,
            "warmup_steps": 0,
            "context_alignment_steps": 0,
            "per_device_train_batch_size": given.batch,
            "dataloader_num_workers": given.workers if given.part == "ours" else 1,
            "save_steps": given.steps,
            "output_dir": given.folder / f"{given.part}_{given.labels.stem}",
        }
    )
    if given.part == "ours":
        finetune(config, Console(quiet=True))
    else:
        import stock_recipe

        stock_recipe.train(config, None, mapped=True)


if __name__ == "__main__":
    main()
