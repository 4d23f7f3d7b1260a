"""What a result was measured on, and the file it is kept in."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "soundfile", "pydantic")
GIBIBYTE = 1 << 30


def report(values: dict[str, Any], out: Path | None) -> None:
    """Write `values` with commit, date, hardware and versions as JSON to `out`, where one is given."""
    if out is None:
        return
    found = {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
    }
    found["versions"] = {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".part")
    temporary.write_text(json.dumps(found | values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out)


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What was asked for, without the paths of this machine."""
    named = {key: value for key, value in vars(given).items() if key not in ("out", "part", "folder")}
    named["model"] = Path(given.model).name if given.model else "whisper-tiny's shape, random weights"
    named["data"] = "/".join(given.data.parts[-2:]) if given.data else "made up"
    return named


def commit() -> str:
    """The checked-out commit, marked where the package differs from it; "unknown" outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src")
        return git("rev-parse", "HEAD") + (" with uncommitted changes in src" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory and GPU. Asks nvidia-smi for the GPU: torch would fill memory here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": cpu_name(), "cores": cores, "gpu": gpu_name()}
    if hasattr(os, "sysconf"):
        found["ram_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIBIBYTE, 1)
    if hasattr(os, "getloadavg"):
        found["load_average_1_5_15_min"] = [round(load, 2) for load in os.getloadavg()]
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_name() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
