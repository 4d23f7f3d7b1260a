"""Does streaming keep up with a list of files, and does its memory stay flat?

    python benchmarks/streaming.py --out benchmarks/results/streaming.json      about 20 minutes on two cores

1. The same clips from tar shards (streamed) and from single files (listed), each through its own loader with the same workers,
   batches and features, with nothing else to wait for: training hides the loader, so this is the harshest comparison. In
   turns, several rounds, each of two passes; the second one is measured: in the first a stream fills its buffer.
2. Ten epochs over shards with 100,000 short clips: the resident set size of the process and its workers, added up, behind each epoch.

The last line is `ratio X.XX`, streamed to listed, the median of the rounds. Nothing else should run.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

import machine
import made_up

SEED = 1
BUFFER = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="folder of a Whisper checkpoint, for its tokenizer; left out, whisper-tiny's shape"
    )
    parser.add_argument("--clips", type=int, default=2400, help="of the comparison")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of a clip")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=100_000, help="clips of the long stream")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = given.model or str(made_up.write_model(folder / "model"))
        speed = compare(given, folder, model)
        memory = watch(given, folder, model)
    values = {
        "settings": {key: value for key, value in vars(given).items() if key not in ("out", "model")},
        **speed,
        **memory,
    }
    machine.report(values, given.out)
    print(f"listed {values['listed_clips_per_second']:.0f} clips/s, streamed {values['streamed_clips_per_second']:.0f}")
    print(f"processor time a clip, listed to streamed: {values['cpu_ratio']:.2f}")
    print(f"memory grew by {values['growth_mib']:.1f} MiB between the second epoch and the last")
    print(f"ratio {values['ratio']:.2f}")


def compare(given: argparse.Namespace, folder: Path, model: str) -> dict[str, Any]:
    from resonance.cli import run
    from resonance.data.check import probe_durations
    from resonance.data.formats import load_manifest
    from resonance.data.sources import open_source

    labels = made_up.write_clips(folder / "clips", given.clips, given.seconds, seed=0)
    if run(["data", "shard", "--train_file", str(labels), "--output_dir", str(folder / "shards"), "--shard_size=32MB"]):
        sys.exit("resonance data shard failed")
    rows = probe_durations(load_manifest(labels).utterances) * 2
    source = open_source(folder / "shards")
    rounds = []
    for _round in range(given.rounds):
        listed, listed_ms = second_pass(listed_batches(rows, model, given), given)
        streamed, streamed_ms = second_pass(streamed_batches(source, model, given), given)
        rounds.append(
            {
                "listed": round(listed, 1),
                "streamed": round(streamed, 1),
                "ratio": round(streamed / listed, 4),
                "listed_cpu_ms_a_clip": round(listed_ms, 4),
                "streamed_cpu_ms_a_clip": round(streamed_ms, 4),
            }
        )
        print(f"listed {listed:.0f} clips/s, streamed {streamed:.0f}", flush=True)
    return {
        "rounds": rounds,
        "listed_clips_per_second": statistics.median(one["listed"] for one in rounds),
        "streamed_clips_per_second": statistics.median(one["streamed"] for one in rounds),
        "ratio": round(statistics.median(one["ratio"] for one in rounds), 4),
        # Processor time does not tell of waiting, but other programs change it less.
        "cpu_ratio": round(
            statistics.median(one["listed_cpu_ms_a_clip"] for one in rounds)
            / max(statistics.median(one["streamed_cpu_ms_a_clip"] for one in rounds), 1e-9),
            4,
        ),
    }


def parts(model: str) -> tuple[Any, Any]:
    """What both loaders do with a clip and with a batch."""
    from resonance.data.audio_context import AudioContext
    from resonance.data.batches import Collator
    from resonance.data.tokens import LabelTokenizer
    from resonance.model.load import load_tokenizer

    tokenizer = LabelTokenizer(*load_tokenizer(model), "en")
    return tokenizer, Collator(AudioContext("auto", 0.6), 80, tokenizer.special("<|endoftext|>"))


def listed_batches(rows: list[Any], model: str, given: argparse.Namespace) -> Iterable[Any]:
    from torch.utils.data import DataLoader

    from resonance.data.batches import ClipDataset, LengthGroupedSampler

    tokenizer, collate = parts(model)
    sampler = LengthGroupedSampler([row.duration for row in rows], given.batch, SEED)
    return DataLoader(
        ClipDataset(rows, tokenizer), given.batch, sampler=sampler, num_workers=given.workers, collate_fn=collate
    )


def streamed_batches(source: Any, model: str, given: argparse.Namespace) -> Iterable[Any]:
    from resonance.data.batches import ClipMaker
    from resonance.data.choice import Choice
    from resonance.data.clip_stream import ClipStream, Layout, step_loader

    tokenizer, collate = parts(model)
    layout = Layout(SEED, rank=0, ranks=1, workers=given.workers, accumulation=1, batch=given.batch, buffer=BUFFER)
    stream = ClipStream(source, ClipMaker(tokenizer, None, 0.0), collate, Choice(0.1, 30.0, None), layout, skip=False)
    return step_loader(stream, pin_memory=False)


def second_pass(batches: Iterable[Any], given: argparse.Namespace) -> tuple[float, float]:
    """Of the second pass of two: clips a second, and milliseconds of processor time a clip, workers included."""
    a_pass = given.clips // given.batch
    began = used = 0.0
    for number, _batch in enumerate(batches, 1):
        if number == a_pass:
            began, used = time.perf_counter(), cpu_seconds()
        if number == 2 * a_pass:
            clips = a_pass * given.batch
            return clips / (time.perf_counter() - began), 1000 * (cpu_seconds() - used) / clips
    raise AssertionError("fewer batches than clips")


def cpu_seconds() -> float:
    """Of this process and its workers."""
    process = psutil.Process()
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def watch(given: argparse.Namespace, folder: Path, model: str) -> dict[str, Any]:
    """Memory of this process and its workers behind each epoch."""
    from resonance.data.sources import open_source

    source = open_source(write_short_clips(folder / "many", given.rows))
    epochs: list[float] = []
    heard, slowest = 0, 0
    many = argparse.Namespace(
        **{**vars(given), "batch": min(8 * given.batch, given.rows)}
    )  # short clips, so more of them
    for step in streamed_batches(source, model, many):
        heard += many.batch
        if heard >= (len(epochs) + 1) * given.rows:
            epochs.append(memory_mib())
            print(f"epoch {len(epochs)}: {epochs[-1]:.1f} MiB", flush=True)
            slowest = step.standing.start.epoch
        if len(epochs) == given.epochs:
            break
    return {
        "memory_mib": epochs,
        "last_epoch_read": slowest,
        "growth_mib": round(epochs[-1] - epochs[min(1, len(epochs) - 1)], 1),
    }


def write_short_clips(folder: Path, rows: int) -> Path:
    """Tar files with so many clips of 0.2 s, in WebDataset's layout."""
    import numpy as np
    import soundfile

    folder.mkdir()
    random = np.random.default_rng(0)
    sounds = []
    for _sound in range(64):
        file = io.BytesIO()
        soundfile.write(file, 0.1 * random.standard_normal(3200), made_up.SAMPLE_RATE, format="FLAC")
        sounds.append(file.getvalue())
    for first in range(0, rows, 5000):
        with tarfile.open(folder / f"{first:09}.tar", "w") as archive:
            for i in range(first, min(first + 5000, rows)):
                text = json.dumps({"text": f"clip {i}", "duration": 0.2}).encode()
                for name, data in ((f"{i:09}.flac", sounds[i % 64]), (f"{i:09}.json", text)):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return folder


def memory_mib() -> float:
    process = psutil.Process()
    every = [process, *process.children(recursive=True)]
    # Resident, shared pages counted in each: what is proportional changes with other programs that load the same libraries.
    return round(sum(one.memory_info().rss for one in every) / (1 << 20), 1)


if __name__ == "__main__":
    main()
