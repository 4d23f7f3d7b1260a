"""Milliseconds until one person's adapter is in memory, beside PEFT's `load_adapter`, and the memory of a service that reads
many.

    python benchmarks/adapter_load.py

A random model of whisper-small's shape (768 wide, 12 and 12 layers) takes `--adapters` LoRA adapters of rank 32 on q_proj and
v_proj, 14 MB each, read from the file cache: by `peft` into one model with all those before it, as it
does in services with `set_adapter`; by Resonance from the folder (`read_adapter`), and through the pool, which compares every
file with its checksum (tokenizer.json of Whisper's size among them). One after the other in turn. Then the pool reads
`--cycles` adapters with a budget for ten. The last line is the median of `read_adapter` in milliseconds, then PEFT's for the
last adapters.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import machine
from made_up_adapter import TARGETS, Base, make_adapter

if TYPE_CHECKING:
    import torch

FOLDERS = 4  # written; more would only fill the disk
SIDE_FILES = {  # as large as Whisper's
    name: b" " * size
    for name, size in (("tokenizer.json", 3_930_000), ("vocab.json", 1_040_000), ("preprocessor_config.json", 340))
}
GOAL_MS = 17


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12, help="of the encoder, and of the decoder")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=40)
    parser.add_argument("--cycles", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(given, Path(folder))
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    machine.report({"settings": settings, **found, "goal_ms": GOAL_MS}, given.out)
    for name, values in found["ms"].items():
        print(f"{name:13}" + ", ".join(f"{kind} {value}" for kind, value in values.items()) + " ms")
    print(f"resident memory by quarters of {given.cycles} readings: {found['resident_mib']} MiB")
    print(f"ms {found['ms']['read_adapter']['median']:.1f} read_adapter, {found['ms']['peft']['last']:.1f} peft")


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from resonance.model.allocator import return_large_blocks  # before torch, as in the service

    return_large_blocks()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from resonance.model.lora import quiet_peft
    from resonance.model.lora_weights import read_adapter
    from resonance.model.mixing import make_mixable
    from resonance.serve.pool import AdapterPool
    from resonance.serve.store import AdapterStore

    torch.set_num_threads(given.threads)
    shape = {
        "d_model": given.width,
        "encoder_layers": given.layers,
        "decoder_layers": given.layers,
        "encoder_ffn_dim": 4 * given.width,
        "decoder_ffn_dim": 4 * given.width,
        "encoder_attention_heads": given.width // 16,
        "decoder_attention_heads": given.width // 16,
    }
    with torch.device("meta"):  # only names and shapes count here
        linear = make_mixable(WhisperForConditionalGeneration(WhisperConfig(**shape)))[1]
    made_for = Base("whisper-small's shape, random weights", "0" * 64, linear, SIDE_FILES)
    base = Loaded(made_for.name, made_for.fingerprint, linear, torch.float32, torch.device("cpu"))
    config = LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules=list(TARGETS))
    with quiet_peft():
        tuned = get_peft_model(WhisperForConditionalGeneration(WhisperConfig(**shape)), config)
    for i in range(FOLDERS):
        make_adapter(made_for, seed=i, rank=given.rank).write(folder / "plain" / str(i))
    (folder / "store").mkdir()
    store = AdapterStore(folder / "store")
    people = [f"person-{i}" for i in range(given.adapters)]
    for i, person in enumerate(people):
        store.put(person, folder / "plain" / str(i % FOLDERS))
    size = read_adapter(folder / "plain" / "0", name="", version="", base=base).nbytes
    pool = AdapterPool(store, base, 10 * size, 3600.0)

    def peft(i: int) -> None:
        with quiet_peft():
            tuned.load_adapter(str(folder / "plain" / str(i % FOLDERS)), adapter_name=f"person-{i}")

    ways: dict[str, Callable[[int], object]] = {
        "read_adapter": lambda i: read_adapter(folder / "plain" / str(i % FOLDERS), name="", version="", base=base),
        "pool": lambda i: pool.release(pool.acquire(people[i])),
        "peft": peft,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for i in range(given.adapters):
        for name, read in ways.items():
            began, busy = time.perf_counter(), time.process_time()
            read(i)
            times[name].append((1000 * (time.perf_counter() - began), 1000 * (time.process_time() - busy)))
    few = max(1, given.adapters // 8)
    ms = {
        name: {
            "median": middle(wall for wall, _cpu in found),
            "best": round(min(wall for wall, _cpu in found), 1),
            "first": middle(wall for wall, _cpu in found[:few]),
            "last": middle(wall for wall, _cpu in found[-few:]),
            "cpu_median": middle(cpu for _wall, cpu in found),
        }
        for name, found in times.items()
    }
    choice, resident = random.Random(0), []
    for cycle in range(1, given.cycles + 1):
        pool.release(pool.acquire(choice.choice(people)))
        if cycle % (given.cycles // 4) == 0:
            resident.append(resident_mib())
    return {"adapter_bytes": size, "ms": ms, "resident_mib": resident, "evictions": pool.stats().evictions}


def middle(times: Iterable[float]) -> float:
    return round(statistics.median(times), 1)


class Loaded(NamedTuple):
    """The model, as far as reading adapters for it goes."""

    name: str
    fingerprint: str
    linear_shapes: dict[str, tuple[int, int]]
    dtype: torch.dtype
    device: torch.device


def resident_mib() -> int:
    """Of this process. 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


if __name__ == "__main__":
    main()
