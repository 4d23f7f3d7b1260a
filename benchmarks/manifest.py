"""Seconds and memory that a manifest of 100,000 rows takes, in every format.

    python benchmarks/manifest.py

Each format is read in a process of its own. Memory is what the process grew by while reading, at its largest; importing the
package `datasets` comes before and is measured apart. The last line is `rows_per_second N`, of the
slowest format.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import machine

GOAL_SECONDS = 2.0
GOAL_MEBIBYTES = 100
FORMATS: dict[str, str] = {  # and the file or folder that it is read from
    "JSON list": "list.json",
    "JSON map": "map.json",
    "JSON lines": "rows.jsonl",
    "CSV": "table.csv",
    "TSV": "table.tsv",
    "Kaldi": "kaldi",
    "data folder": "folder",
    "saved dataset": "saved",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        print(json.dumps(read(given.read)))
    elif given.write:
        write_all(given.write, given.rows)
    else:
        compare(given)


def compare(given: argparse.Namespace) -> None:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        # Apart, because a process is born with its parent's size as its peak.
        subprocess.run([sys.executable, __file__, "--rows", str(given.rows), "--write", name], check=True)
        for title, file in FORMATS.items():
            if not (Path(name) / file).exists():
                print(f"{title:14} not measured: the package datasets is not installed")
                continue
            command = [sys.executable, __file__, "--read", str(Path(name) / file)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result = json.loads(output)
            if result.pop("rows") != given.rows:
                sys.exit(f"{title}: not all rows were read.")
            found[title] = result
            print(
                f"{title:14} {result['seconds']:6.2f} s, {result['cpu_seconds']:.2f} s of processor time, {result['mebibytes']:.1f} MiB"
                + (
                    f", and {extra:.1f} MiB for the package itself"
                    if (extra := result.get("library_mebibytes"))
                    else ""
                ),
                flush=True,
            )
    slowest = given.rows / max(result["seconds"] for result in found.values())
    values = {"rows": given.rows, "formats": found, "rows_per_second": round(slowest)}
    machine.report(values | {"goal": {"seconds": GOAL_SECONDS, "mebibytes": GOAL_MEBIBYTES}}, given.out)
    print(f"rows_per_second {slowest:.0f}")


def read(path: Path) -> dict[str, float]:
    import resource

    from resonance.data.formats import load_manifest

    def peak() -> float:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    empty = peak()
    library = {}
    if path.name == "saved":  # what `import datasets` takes is the same for 1 row and for 100,000
        import datasets  # noqa: F401

        library = {"library_mebibytes": round(peak() - empty, 1)}
    before, began, cpu = peak(), time.perf_counter(), time.process_time()
    rows = load_manifest(path).utterances
    return {
        "rows": len(rows),
        "seconds": round(time.perf_counter() - began, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "mebibytes": round(peak() - before, 1),
        **library,
    }


def write_all(folder: Path, count: int) -> None:
    """The same rows in every format. The audio files are not there: reading a manifest does not look at them."""
    rows = [
        (f"audio/speaker_{i % 50:03}/{i:06}.wav", f"phrase number {i} said aloud", f"s{i % 50}") for i in range(count)
    ]
    records = [{"audio": audio, "text": text, "speaker": speaker} for audio, text, speaker in rows]
    writers: dict[str, Callable[[Path], object]] = {
        "list.json": lambda path: path.write_text(json.dumps(records), encoding="utf-8"),
        "map.json": lambda path: path.write_text(json.dumps({a: t for a, t, _s in rows}), encoding="utf-8"),
        "rows.jsonl": lambda path: path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8"),
        "table.csv": lambda path: write_table(path, rows, ","),
        "table.tsv": lambda path: write_table(path, rows, "\t"),
        "kaldi": lambda path: write_kaldi(path, rows),
        "folder": lambda path: write_folder(path, records),
    }
    if find_spec("datasets"):
        writers["saved"] = lambda path: save_dataset(path, records)
    for name, write in writers.items():
        write(folder / name)


def write_table(path: Path, rows: list[tuple[str, str, str]], delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([("audio", "text", "speaker"), *rows])


def write_kaldi(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    folder.mkdir()
    for name, column in (("wav.scp", 0), ("text", 1), ("utt2spk", 2)):
        lines = [f"{i:06} {row[column]}\n" for i, row in enumerate(rows)]
        (folder / name).write_text("".join(lines), encoding="utf-8")


def write_folder(folder: Path, records: list[dict[str, str]]) -> None:
    folder.mkdir()
    (folder / "labels.json").write_text(json.dumps(records), encoding="utf-8")


def save_dataset(folder: Path, records: list[dict[str, str]]) -> None:
    import datasets

    datasets.disable_progress_bars()
    dataset: Any = datasets.Dataset.from_list(records)
    dataset.save_to_disk(str(folder))


if __name__ == "__main__":
    main()
