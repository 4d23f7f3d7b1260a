"""What a batch of clips takes to prepare: decoded in every pass, against read from the features kept on disk.

    python benchmarks/feature_cache.py
    python benchmarks/feature_cache.py --data labels.json

One process, one thread, as a worker of a training has. Both read the same clips in batches of the same length, in turn, in each
of `--passes` passes; the pass that fills the cache is measured too. Each pass' time is that of all clips, and the last line
compares the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import made_up


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        values = measure(given, Path(folder))
    machine.report({"settings": machine.settings(given), **values}, given.out)
    print(f"{values['clips']} clips of {values['mean_seconds']:.2f} s, {values['kib_a_clip']:.0f} KiB of features each")
    print(f"decoded {values['decoded_ms']:.2f} ms a clip, decoded and kept {values['filling_ms']:.2f} ms")
    print(f"read from the cache {values['cached_ms']:.2f} ms a clip")
    print(f"ratio {values['ratio']:.2f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="recordings and transcripts; left out, clips are made up")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the made-up clips")
    parser.add_argument("--clips", type=int, default=400, help="how many are made up, or used at most")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    given.model = None
    return given


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import torch

    from resonance.data.audio import read_audio
    from resonance.data.audio_context import AudioContext
    from resonance.data.batches import batch_features
    from resonance.data.check import probe_durations
    from resonance.data.feature_cache import FeatureCache
    from resonance.data.formats import load_manifest

    torch.set_num_threads(1)
    labels = given.data or made_up.write_clips(folder / "clips", given.clips, given.seconds, seed=0)
    rows = probe_durations(load_manifest(labels).utterances)[: given.clips]
    rows.sort(key=lambda row: row.duration or 0.0)
    context, cache = AudioContext("auto", 0.6), FeatureCache(folder / "features", 80)

    def seconds(cached: bool) -> float:
        began = time.perf_counter()
        for first in range(0, len(rows), given.batch):
            part = rows[first : first + given.batch]
            clips = [cache.features(r) if cached else read_audio(r.audio, r.start, r.end) for r in part]
            batch_features(clips, context, 80)
        return time.perf_counter() - began

    seconds(cached=False)  # the filters are computed, the files are in the system's memory
    filling = seconds(cached=True)
    decoded, read = zip(*((seconds(cached=False), seconds(cached=True)) for _pass in range(given.passes)), strict=True)
    size = sum(file.stat().st_size for file in cache.folder.rglob("*.safetensors"))

    def milliseconds(values: Any) -> float:
        return round(1000 * statistics.median(values) / len(rows), 3)

    return {
        "clips": len(rows),
        "mean_seconds": round(sum(row.duration or 0.0 for row in rows) / len(rows), 3),
        "kib_a_clip": round(size / len(rows) / 1024, 1),
        "filling_ms": milliseconds([filling]),
        "decoded_ms": milliseconds(decoded),
        "cached_ms": milliseconds(read),
        "ratio": round(statistics.median(decoded) / statistics.median(read), 2),
    }


if __name__ == "__main__":
    main()
