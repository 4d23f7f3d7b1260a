"""Freed memory goes back to the system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# A small block behind each large one keeps the heap from shrinking, as other tensors do in training.
CODE = """
import json, sys
import psutil
from resonance.model.allocator import return_large_blocks
import torch
tuned = return_large_blocks() if sys.argv[1] == "tuned" else None
blocks, pins = [], []
torch.ones(6 << 20).sum()  # 24 MB, freed: glibc raises its own threshold to that
for i in range(40):
    blocks.append(torch.ones(2 << 20))  # 8 MB
    pins.append(torch.ones(16 << 10))  # 64 kB
before = psutil.Process().memory_info().rss
del blocks
print(json.dumps([tuned, (before - psutil.Process().memory_info().rss) / 2**20]))
"""


def freed_mebibytes(mode: str) -> tuple[bool | None, float]:
    output = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True).stdout
    tuned, freed = json.loads(output)
    return tuned, freed


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_large_tensors_between_small_ones_are_given_back() -> None:
    tuned, freed = freed_mebibytes("tuned")
    if not tuned:
        pytest.skip("another C library than glibc")
    assert freed > 300  # of 320
    assert freed_mebibytes("plain")[1] < 100, "the C library does it by itself: the setting can go"


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE.exists() or "[never]" in HUGE.read_text(), reason="a system without huge pages")
@pytest.mark.parametrize("module", ["resonance.finetune", "resonance.serve.service"])
def test_training_and_service_get_huge_pages_whatever_is_imported_first(module: str) -> None:
    code = (
        f"import {module}, torch; block = torch.ones(16 << 20); "
        "print([line for line in open('/proc/self/smaps_rollup') if line.startswith('AnonHugePages')][0].split()[1])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output.split()[-1]) > 48 << 10  # kB of 64 MiB
