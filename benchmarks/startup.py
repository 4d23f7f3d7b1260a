"""Seconds until the help is on the screen, in fresh processes.

    python benchmarks/startup.py

The last line is `seconds X.XX`, the best of five for `resonance --help`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine

GOAL_SECONDS = 0.5
COMMANDS = ("--help", "train --help", "evaluate --help", "transcribe --help", "data check --help")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    found: dict[str, Any] = {}
    for command in COMMANDS:
        times = [seconds(command.split()) for _run in range(given.runs)]
        wall, cpu = min(wall for wall, _cpu in times), min(cpu for _wall, cpu in times)
        found[f"resonance {command}"] = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
        print(f"resonance {command:18} {wall:.2f} s, {cpu:.2f} s of processor time", flush=True)
    best = found["resonance --help"]["seconds"]
    machine.report({"runs": given.runs, "commands": found, "goal_seconds": GOAL_SECONDS, "seconds": best}, given.out)
    print(f"seconds {best:.2f}")


def seconds(arguments: list[str]) -> tuple[float, float]:
    """Wall time and processor time of one process."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "resonance", *arguments], stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - began, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


if __name__ == "__main__":
    main()
