"""Recordings answered in a second by one service for many people, beside the services that people write.

    python benchmarks/serve.py

16 clients, each with an adapter of its own, ask over HTTP, one request after the other (`plain_service.py` has the other two):
- plain: FastAPI and PEFT, one request at a time, 30 s windows, transformers' `generate`;
- swapping: the same at the length of the recording, with Resonance's decoding: what is left is batching across people.
Weights are random, of whisper-tiny's shape, and made to write the same number of tokens for each recording. All services run
side by side and are asked in turn, in `--rounds` rounds, each with as many threads; what waits costs nothing. The last line
compares the medians. Latencies are measured at full load, as above, and with requests that arrive by chance (a Poisson process)
at half of each service's own throughput.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import made_up
from made_up_adapter import base_of, make_adapter

DEMO = machine.REPOSITORY / "src" / "resonance" / "demo_speaker" / "labels.json"
PROMPT_TOKENS = 4
RANKS = (4, 8, 16, 32)
BOUNDARY = "benchmark"
HALF_LOAD_SECONDS = 40


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        values = measure(given, Path(folder))
    machine.report({"settings": machine.settings(given), **values}, given.out)
    print(f"{values['clips']} recordings of {values['mean_seconds']:.1f} s, {given.tokens} tokens each")
    for name, found in values["services"].items():
        full, half = found["full_load"], found["half_load"]
        print(
            f"  {name}: {found['a_second']:.2f} a second; p50/p95/p99 {full['p50_ms']}/{full['p95_ms']}/{full['p99_ms']} ms, "
            f"at half load {half['p50_ms']}/{half['p95_ms']}/{half['p99_ms']} ms"
        )
    print(f"ratio {values['ratio_plain']:.2f} plain, {values['ratio_swapping']:.2f} swapping")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Whisper checkpoint; left out, one of whisper-tiny's shape is made up")
    parser.add_argument("--data", type=Path, default=DEMO, help="recordings; left out, those of `resonance demo`")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=8, help="of each client in a round")
    parser.add_argument("--tokens", type=int, default=12, help="tokens written for a recording")
    parser.add_argument("--threads", type=int, default=2, help="of each service")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    return parser.parse_args()


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = short_and_endless(
        Path(given.model) if given.model else made_up.write_model(folder / "made-up"), given.tokens, folder
    )
    people = [f"person-{i}" for i in range(given.clients)]
    for i, name in enumerate(people):
        make_adapter(base_of(model), seed=i, rank=RANKS[i % len(RANKS)]).write(folder / "adapters" / name)
    clips, seconds = recordings(given, folder)
    with contextlib.ExitStack() as running:
        services = {name: running.enter_context(start(given, model, folder)) for name, start in SERVICES.items()}
        texts = {name: answers(port, people, clips) for name, port in services.items()}
        assert texts["Resonance"] == texts["swapping"], "at the same context both must understand the same"
        rounds: dict[str, list[list[float]]] = {name: [] for name in services}
        rates: dict[str, list[float]] = {name: [] for name in services}
        order = list(services)
        for turn in range(given.rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                began = time.perf_counter()
                latencies = closed_loop(services[name], people, clips, given.requests)
                rates[name].append(len(latencies) / (time.perf_counter() - began))
                rounds[name].append(latencies)
        half = {
            name: open_loop(port, people, clips, statistics.median(rates[name]) / 2, given)
            for name, port in services.items()
        }
    found = {
        name: {
            "a_second": round(statistics.median(rates[name]), 3),
            "rounds": [round(rate, 3) for rate in rates[name]],
            "full_load": percentiles([one for some in rounds[name] for one in some]),
            "half_load": percentiles(half[name]),
        }
        for name in services
    }
    ours = found["Resonance"]["a_second"]
    return {
        "clips": len(clips),
        "mean_seconds": round(statistics.mean(seconds), 3),
        "services": found,
        "ratio_plain": round(ours / found["plain"]["a_second"], 3),
        "ratio_swapping": round(ours / found["swapping"]["a_second"], 3),
    }


def short_and_endless(model: Path, tokens: int, folder: Path) -> Path:
    """The checkpoint with room for a prompt and so many tokens, and made never to end before: all services write as many."""
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer

    whisper = WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    room = PROMPT_TOKENS + tokens
    positions = whisper.model.decoder.embed_positions
    positions.weight = torch.nn.Parameter(positions.weight[:room].detach().clone())
    positions.num_embeddings = room
    whisper.config.max_target_positions = room
    config = whisper.generation_config
    config._from_model_config = False
    config.max_length = room
    config.suppress_tokens = list(range(config.eos_token_id, whisper.config.vocab_size))
    config.begin_suppress_tokens = None
    whisper.save_pretrained(folder / "model")
    WhisperTokenizer.from_pretrained(model).save_pretrained(folder / "model")
    WhisperFeatureExtractor.from_pretrained(model).save_pretrained(folder / "model")
    return folder / "model"


def recordings(given: argparse.Namespace, folder: Path) -> tuple[list[bytes], list[float]]:
    """WAV files of 1 to 5 s, two for each client, and their lengths."""
    from resonance.data.audio import read_audio, write_wav
    from resonance.data.check import probe_durations
    from resonance.data.formats import load_manifest

    rows = [row for row in probe_durations(load_manifest(given.data).utterances) if 1 <= (row.duration or 0) <= 5]
    rows = rows[:: max(1, len(rows) // (2 * given.clients))][: 2 * given.clients]
    clips = []
    for i, row in enumerate(rows):
        write_wav(folder / f"{i}.wav", read_audio(row.audio, row.start, row.end))
        clips.append((folder / f"{i}.wav").read_bytes())
    return clips, [row.duration or 0 for row in rows]


def resonance_service(given: argparse.Namespace, model: Path, folder: Path) -> contextlib.AbstractContextManager[int]:
    flags = {
        "model": model,
        "adapters": folder / "adapters",
        "device": "cpu",
        "auth": "off",
        "requests_per_minute": 1_000_000,
        "temperature_increment_on_fallback": 0,
        "audit_log": folder / "audit.jsonl",
    }
    return running(
        lambda port: ["-m", "resonance", "serve", f"--port={port}", *(f"--{k}={v}" for k, v in flags.items())],
        given,
        folder,
    )


def plain_service(how: str) -> Callable[[argparse.Namespace, Path, Path], contextlib.AbstractContextManager[int]]:
    script = Path(__file__).with_name("plain_service.py")

    def start(given: argparse.Namespace, model: Path, folder: Path) -> contextlib.AbstractContextManager[int]:
        flags = [f"--model={model}", f"--adapters={folder / 'adapters'}", f"--how={how}"]
        return running(lambda port: [str(script), f"--port={port}", *flags], given, folder)

    return start


SERVICES = {"Resonance": resonance_service, "plain": plain_service("generate"), "swapping": plain_service("swap")}


@contextlib.contextmanager
def running(command: Callable[[int], list[str]], given: argparse.Namespace, folder: Path) -> Iterator[int]:
    """A service in a process of its own, once it answers: its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "RESONANCE_HOME": str(folder / "home")}
    log = folder / f"{port}.log"
    with log.open("wb") as into:
        process = subprocess.Popen([sys.executable, *command(port)], env=environment, stdout=into, stderr=into)
    try:
        until = time.monotonic() + 180
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit("A service did not start:\n" + log.read_text(errors="replace")[-3000:])
            time.sleep(0.2)
        yield port
    finally:
        process.kill()
        process.wait()


def healthy(port: int) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


def ask(connection: http.client.HTTPConnection, person: str, clip: bytes) -> str:
    body = (
        (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="patient_id"\r\n\r\n{person}\r\n'
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        ).encode()
        + clip
        + f"\r\n--{BOUNDARY}--\r\n".encode()
    )
    connection.request("POST", "/transcribe", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})
    response = connection.getresponse()
    answer = response.read()
    assert response.status == 200, (response.status, answer[:300])
    return str(json.loads(answer)["text"])


def answers(port: int, people: list[str], clips: list[bytes]) -> list[str]:
    """One answer for each person: adapters are loaded then."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    return [ask(connection, person, clips[i]) for i, person in enumerate(people)]


def closed_loop(port: int, people: list[str], clips: list[bytes], requests: int) -> list[float]:
    """Every person asks as soon as the answer before is there. Seconds of each request."""
    found: list[float] = []

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        for turn in range(requests):
            began = time.perf_counter()
            ask(connection, people[number], clips[(2 * number + turn) % len(clips)])
            found.append(time.perf_counter() - began)

    together([lambda number=number: client(number) for number in range(len(people))])
    assert len(found) == len(people) * requests
    return found


def open_loop(port: int, people: list[str], clips: list[bytes], rate: float, given: argparse.Namespace) -> list[float]:
    """Requests of anybody that arrive by chance, so many a second, whether or not the ones before are answered."""
    chance = random.Random(0)
    found: list[float] = []
    count = max(48, min(given.clients * given.requests, round(HALF_LOAD_SECONDS * rate)))
    arrivals, now = [], 0.0
    for _request in range(count):
        now += chance.expovariate(rate)
        arrivals.append(now)
    start = time.perf_counter() + 0.1

    def request(number: int) -> None:
        time.sleep(max(0.0, start + arrivals[number] - time.perf_counter()))
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        ask(connection, people[number % len(people)], clips[number % len(clips)])
        found.append(time.perf_counter() - began)

    together([lambda number=number: request(number) for number in range(count)])
    assert len(found) == count
    return found


def together(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def percentiles(seconds: list[float]) -> dict[str, int]:
    ordered = sorted(seconds)
    return {
        f"p{p}_ms": round(1000 * ordered[min(len(ordered) - 1, round(p / 100 * len(ordered)))]) for p in (50, 95, 99)
    }


if __name__ == "__main__":
    main()
