"""What a training can run on: found on this machine, or named by the user. Free of torch, so that `plan` starts at once."""

from __future__ import annotations

import difflib
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from resonance.errors import ConfigError
from resonance.messages import _
from resonance.units import GIBIBYTE, MEBIBYTE

CGROUP = Path("/sys/fs/cgroup")
QUERY_SECONDS = 20.0  # nvidia-smi takes some seconds where no process holds the driver
# Matrix products that a processor core can be counted on for, in float32: 16 multiply-adds a cycle at 2.5 GHz.
CPU_CORE_FLOPS = 16 * 2 * 2.5e9


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or the processor. Speeds are peaks; `flops` counts dense products in its training precision."""

    kind: Literal["cuda", "mps", "cpu"]
    name: str
    memory: int  # bytes
    free: int  # bytes, what other processes leave
    flops: float  # a second
    bandwidth: float  # bytes a second
    bf16: bool = False
    here: bool = False  # this machine has it, and what is installed here counts

    @property
    def precision(self) -> Literal["fp32", "fp16", "bf16"]:
        """The number format that `--precision auto` takes there."""
        if self.kind != "cuda":
            return "fp32"
        return "bf16" if self.bf16 else "fp16"


def _card(name: str, gib: float, teraflops: float, gigabytes: float, bf16: bool = True) -> Device:
    memory = int(gib * GIBIBYTE)
    return Device("cuda", name, memory, memory, teraflops * 1e12, gigabytes * 1e9, bf16)


# Memory, 16-bit tensor operations (dense, accumulated in 32 bits) and memory bandwidth: NVIDIA's white papers of the
# Turing, Ampere, Ada and Blackwell GPUs and the data sheets of the data-centre cards.
CARDS = (
    _card("GTX 1660 Ti", 6, 11, 288, bf16=False),
    _card("RTX 2060", 6, 26, 336, bf16=False),
    _card("RTX 2080 Ti", 11, 54, 616, bf16=False),
    _card("T4", 15, 65, 320, bf16=False),
    _card("V100", 16, 112, 900, bf16=False),
    _card("RTX 3050", 8, 18, 224),
    _card("RTX 3060 Ti", 8, 32, 448),
    _card("RTX 3060", 12, 26, 360),
    _card("RTX 3070", 8, 41, 448),
    _card("RTX 3080", 10, 60, 760),
    _card("RTX 3090", 24, 71, 936),
    _card("RTX 4060 Ti", 8, 44, 288),
    _card("RTX 4060", 8, 30, 272),
    _card("RTX 4070 Ti", 12, 80, 504),
    _card("RTX 4070", 12, 58, 504),
    _card("RTX 4080", 16, 97, 717),
    _card("RTX 4090", 24, 165, 1008),
    _card("RTX 5070", 12, 62, 672),
    _card("RTX 5080", 16, 113, 960),
    _card("RTX 5090", 32, 210, 1792),
    _card("RTX A6000", 48, 155, 768),
    _card("A10G", 24, 70, 600),
    _card("L40S", 48, 362, 864),
    _card("L4", 24, 121, 300),
    _card("A100-80GB", 80, 312, 2039),
    _card("A100", 40, 312, 1555),
    _card("H100", 80, 989, 3350),
    _card("H200", 141, 989, 4800),
)


def choose(gpu: str | None, gpu_memory: int | None) -> Device:
    """The card that is named, the size that is given, or what this machine has."""
    if gpu:
        device = named(gpu)
    elif gpu_memory:
        # A card that is only known by its memory: the speed of the one whose memory is nearest.
        nearest = min(CARDS, key=lambda card: (abs(card.memory - gpu_memory), card.flops))
        device = replace(nearest, name=_("a GPU"))
    else:
        return find()
    return replace(device, memory=gpu_memory, free=gpu_memory) if gpu_memory else device


def named(text: str) -> Device:
    """The card of that name, with or without the maker's. Raises ConfigError with those that are near it."""
    # The longest name first: "RTX 3060 Ti" holds "RTX 3060".
    for card in sorted(CARDS, key=lambda card: -len(card.name)):
        words = "[ _-]*".join(re.findall(r"[a-z]+|[0-9]+", card.name.lower().removeprefix("rtx ")))
        # A Ti, a SUPER or a laptop's card of the same number is another card.
        if re.search(
            rf"(?<![a-z0-9])(rtx)?{words}(?![a-z0-9])(?![ _-]*(ti|super|laptop|mobile|max-q)\b)", text.lower()
        ):
            stated = re.search(r"(\d+) ?gb", text.lower())
            memory = int(stated[1]) * GIBIBYTE if stated else card.memory
            return replace(card, memory=memory, free=memory)
    near = difflib.get_close_matches(text.upper(), [card.name for card in CARDS], 3, 0.4)
    raise ConfigError(
        [
            _(
                "--gpu {name} is not a card known here. Give its memory instead (--gpu_memory 8GB), or one of {names}."
            ).format(name=repr(text), names=", ".join(near or [card.name for card in CARDS]))
        ]
    )


def find() -> Device:
    """This machine's first NVIDIA GPU, Apple GPU or processor."""
    nvidia = None if metadata.version("torch").endswith("+cpu") else _nvidia()  # a build that knows no GPU
    return replace(nvidia or _apple() or processor(), here=True)


def processor() -> Device:
    memory = psutil.virtual_memory()
    limit, left = container_memory(CGROUP)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    name = _("processor, {cores} cores").format(cores=cores)
    return Device(
        "cpu", name, min(memory.total, limit), min(memory.available, left), cores * CPU_CORE_FLOPS, bandwidth=20e9
    )


def container_memory(folder: Path) -> tuple[int, int]:
    """Limit of the control group that this process runs in, and what is left below it: a container may have less memory
    than its machine. Without a limit both are sys.maxsize.

    Files of Linux's cgroup v2 and v1. The file cache, which the kernel gives back, counts as free.
    """
    for limit_name, used_name, stat_name in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
            cache = re.search(r"^(?:total_)?inactive_file (\d+)$", (folder / stat_name).read_text(), re.MULTILINE)
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return limit, max(0, limit - used + (int(cache[1]) if cache else 0))
    return sys.maxsize, sys.maxsize


def _nvidia() -> Device | None:
    """The GPU as nvidia-smi describes it: asking torch would take seconds. Of several the first that programs may use."""
    program = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()  # indices or UUIDs
    if program is None or visible in ("", "-1"):
        return None
    query = [
        "--query-gpu=name,memory.total,memory.free,compute_cap",
        "--format=csv,noheader,nounits",
        f"--id={visible}",
    ]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=QUERY_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return read_nvidia(done.stdout) if done.returncode == 0 else None


def read_nvidia(table: str) -> Device | None:
    """The first GPU in nvidia-smi's table (name, total and free MiB, compute capability); None where there is none."""
    for line in table.splitlines():
        parts = [part.strip() for part in line.split(",")]
        try:
            name, total, free, capability = parts[0], int(parts[1]), int(parts[2]), float(parts[3])
        except (IndexError, ValueError):  # "[Not Supported]", or a message in place of a table
            continue
        try:
            known = named(name)
        except ConfigError:
            known = min(CARDS, key=lambda card: abs(card.memory - total * MEBIBYTE))
        return replace(known, name=name, memory=total * MEBIBYTE, free=free * MEBIBYTE, bf16=capability >= 8)
    return None


def _apple() -> Device | None:
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return None
    memory = psutil.virtual_memory()
    # An M1's GPU: 2.6 TFLOP/s, 68 GB/s (Apple). The memory is shared with everything else that runs.
    return Device("mps", "Apple GPU", memory.total, memory.available, 2.6e12, 68e9)
