"""Does the service answer everybody, as themselves, while a tenth of what it meets is wrong and people come and go?

    python benchmarks/serve_load.py                    # 10,000 requests from 64 clients
    python benchmarks/serve_load.py --requests 300     # a try

Starts `resonance serve` on this machine and asks it over HTTP. Of the requests, `--bad_share` carry what is no usable
audio, some ask for people who do not exist or under ids that are none, some go away before they are answered. Meanwhile
adapters appear, are replaced and are deleted. It fails unless every request was answered with a status that it may have,
none with 500, each by a version that its person had while it was under way, and the memory of the service stayed flat.
Refusals because of overload (429) are waited for as `Retry-After` says, and asked again: nothing may be lost.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil

import bad_audio
import machine
import made_up
from made_up_adapter import MadeUpAdapter, base_of, make_adapter

MEBIBYTE = 1 << 20
REFRESH_SECONDS = 1.0
LEAST_FOR_MEMORY = 2000  # requests: before, the service is still filling its pool
GROWTH = 0.05  # of the memory, between the first and the last quarter
FAILED = re.compile(r'resonance_requests_total\{.*status="500"')
MALFORMED = ("..%2F..%2Fetc", "a" * 10_000, "%F0%9F%99%82", "%00", "a b")


@dataclass(slots=True)
class Person:
    """What a person's adapter was, and when. A change is visible somewhere between its begin and a refresh after its end."""

    changes: list[list[Any]] = field(default_factory=lambda: [[0.0, 0.0, None]])  # begin, end, fingerprint

    @property
    def present(self) -> bool:
        return self.changes[-1][2] is not None

    def may_answer(self, begin: float, end: float) -> set[str | None]:
        """The fingerprints that a request from `begin` to `end` may have met; None: no adapter."""
        ends = [change[1] + REFRESH_SECONDS for change in self.changes[1:]] + [float("inf")]
        spans = zip(self.changes, ends, strict=True)
        return {change[2] for change, last in spans if change[0] <= end and last >= begin}


@dataclass(slots=True)
class Run:
    """Everything that was found."""

    given: argparse.Namespace
    address: str
    model: Path
    people: dict[str, Person]
    clips: list[bytes]
    random: random.Random
    done: int = 0
    statuses: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of those answered with a text
    health: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)  # requests done, bytes
    managed: collections.Counter[str] = field(default_factory=collections.Counter)
    repeated: int = 0
    gone: int = 0

    def expect(self, kind: str, status: int, allowed: set[int], detail: str) -> bool:
        self.statuses[f"{kind} {status}"] += 1
        if status not in allowed:
            self.faults.append(f"{kind}: {status}, expected {sorted(allowed)}: {detail[:300]}")
        return status in allowed


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory() as folder:
        run, values = measure(given, Path(folder))
    machine.report({"settings": settings(given), **values}, given.out)
    for name, value in values.items():
        print(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    for fault in run.faults[:20]:
        print(fault, file=sys.stderr)
    print(f"answered {values['answered']} of {given.requests}, {len(run.faults)} faults")
    sys.exit(1 if run.faults else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a Whisper checkpoint; left out, a small one is made up")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--patients", type=int, default=400, help="people who have an adapter at some time")
    parser.add_argument("--bad_share", type=float, default=0.05, help="requests without usable audio")
    parser.add_argument("--gone_share", type=float, default=0.02, help="clients that go away")
    parser.add_argument("--actions", type=float, default=0.1, help="adapters put or deleted, for each request")
    parser.add_argument("--adapter_memory", default="2MiB", help="room in memory; all of them do not fit")
    parser.add_argument("--max_queued_seconds", type=float, default=100.0, help="low enough for some 429")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    return parser.parse_args()


def settings(given: argparse.Namespace) -> dict[str, Any]:
    named = {key: value for key, value in vars(given).items() if key != "out"}
    return named | {"model": Path(given.model).name if given.model else "2+2 layers, 64 wide, random weights"}


def measure(given: argparse.Namespace, folder: Path) -> tuple[Run, dict[str, Any]]:
    model = Path(given.model) if given.model else made_up.write_model(folder / "model", small=True)
    random_ = random.Random(given.seed)
    people = {f"person-{i}": Person() for i in range(given.patients)}
    for i, (name, person) in enumerate(people.items()):
        if i % 3:  # the others come later
            adapter = make_adapter(base_of(model), seed=i, rank=random_.choice((2, 4, 8)))
            adapter.write(folder / "adapters" / name)
            person.changes.append([0.0, 0.0, adapter.fingerprint])
    labels = made_up.write_clips(folder / "clips", 12, 3.0, given.seed)
    clips = [path.read_bytes() for path in sorted((labels.parent / "audio").iterdir())]
    clips = [bad_audio.shortened(clip, 0.5 + 0.2 * i) for i, clip in enumerate(clips)]
    with server(given, model, folder) as (process, address):
        run = Run(given, address, model, people, clips, random_)
        began = time.monotonic()
        asyncio.run(all_clients(run, process))
        wall = time.monotonic() - began
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            code = None
        if code not in (0, 143):
            run.faults.append(f"stopped by SIGTERM, the service ended with {code}")
    return run, summary(run, wall)


@contextlib.contextmanager
def server(given: argparse.Namespace, model: Path, folder: Path) -> Any:
    """The service as a process of its own, once it is healthy: it and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {
        "model": model,
        "adapters": folder / "adapters",
        "adapter_memory": given.adapter_memory,
        "refresh_seconds": REFRESH_SECONDS,
        "port": port,
        "auth": "off",
        "requests_per_minute": 1_000_000,
        "max_queued_seconds": given.max_queued_seconds,
        "temperature_increment_on_fallback": 0,  # what random weights write is improbable: all would be decoded six times
        "audit_log": folder / "audit.jsonl",
        "device": "cpu",
    }
    command = [sys.executable, "-m", "resonance", "serve", *(f"--{name}={value}" for name, value in flags.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "RESONANCE_HOME": str(folder / "home")}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 180
        while not healthy(address):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit("The service did not start:\n" + (folder / "server.log").read_text(errors="replace")[-3000:])
            time.sleep(0.2)
        yield process, address
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        sys.stderr.write((folder / "server.log").read_text(errors="replace")[-2000:])


def healthy(address: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    return False


async def all_clients(run: Run, process: subprocess.Popen[bytes]) -> None:
    numbers = itertools.count()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=run.given.clients)
    async with httpx.AsyncClient(base_url=run.address, timeout=180, limits=limits) as http:
        others = [asyncio.create_task(work) for work in (manage(run, http), watch(run, http, process))]
        await asyncio.gather(*(client(run, http, numbers) for _ in range(run.given.clients)))
        counted = (await http.get("/metrics")).text
        run.faults += [line for line in counted.splitlines() if FAILED.match(line)]  # also those nobody waited for
        for task in others:
            if task.done():
                task.result()  # what broke it
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def client(run: Run, http: httpx.AsyncClient, numbers: Any) -> None:
    """One of many: asks until all requests are made."""
    kinds = {"bad": run.given.bad_share, "gone": run.given.gone_share, "unknown": 0.02, "malformed": 0.01, "base": 0.1}
    while next(numbers) < run.given.requests:
        lot, kind = run.random.random(), "person"
        for name, share in kinds.items():
            if lot < share:
                kind = name
                break
            lot -= share
        try:
            await ask(run, http, kind)
        except httpx.TransportError as error:
            run.faults.append(f"{kind}: no answer ({type(error).__name__}: {error})")
        run.done += 1


async def ask(run: Run, http: httpx.AsyncClient, kind: str) -> None:
    clip, name = run.random.choice(run.clips), run.random.choice(list(run.people))
    if kind == "bad":
        label, data, allowed = run.random.choice(bad_audio.cases())
        answer = await post(run, http, "/transcribe", data, {})
        run.expect(f"bad: {label}", answer.status_code, allowed, answer.text)
    elif kind == "malformed":
        answer = await post(run, http, f"/patients/{run.random.choice(MALFORMED)}/transcribe", clip, {})
        run.expect(kind, answer.status_code, {400, 404, 414}, answer.text)
    elif kind == "unknown":
        answer = await post(run, http, "/transcribe", clip, {"patient_id": "nobody"})
        run.expect(kind, answer.status_code, {404}, answer.text)
    elif kind == "gone":
        wait = run.random.uniform(0.0, 0.3)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(post(run, http, "/transcribe", clip, {"patient_id": name}), wait)
        run.gone += 1
    else:
        await transcribe(run, http, clip, None if kind == "base" else name)


async def transcribe(run: Run, http: httpx.AsyncClient, clip: bytes, name: str | None) -> None:
    """A request that should be answered, and by whom."""
    path, form = "/transcribe", {"patient_id": name} if name else {}
    if name and run.random.random() < 0.5:
        path, form = f"/patients/{name}/transcribe", {}
    begin = time.monotonic()
    answer = await post(run, http, path, clip, form)
    end = time.monotonic()
    may = run.people[name].may_answer(begin, end) if name else {None}
    allowed = {200} if name is None else ({200} if may - {None} else set()) | ({404} if None in may else set())
    kind = "person" if name else "base"
    if not run.expect(kind, answer.status_code, allowed, f"{name} {answer.text}") or answer.status_code != 200:
        return
    run.seconds.append(end - begin)
    said = answer.json()
    voice = said["adapter"]
    if (voice and voice["fingerprint"]) not in may or (voice and voice["patient_id"] != name):
        run.faults.append(f"asked for {name}, answered by {voice}, expected one of {may}")


async def post(run: Run, http: httpx.AsyncClient, path: str, data: bytes, form: dict[str, str]) -> httpx.Response:
    """An answer that is none of overload's: those are waited for."""
    while True:
        answer = await http.post(path, data=form, files={"file": ("recording.wav", data)})
        if answer.status_code not in (429, 503):
            return answer
        run.repeated += 1
        wait = answer.headers.get("Retry-After", "")
        if not wait.isdigit():
            run.faults.append(f"{answer.status_code} without whole seconds to wait: {wait!r}")
        await asyncio.sleep(min(int(wait) if wait.isdigit() else 1, 5))


async def manage(run: Run, http: httpx.AsyncClient) -> None:
    """People come, are trained again, and leave."""
    seeds = itertools.count(100_000)
    while True:
        if sum(run.managed.values()) >= run.done * run.given.actions:
            await asyncio.sleep(0.02)
            continue
        name = run.random.choice(list(run.people))
        person = run.people[name]
        leaves = person.present and run.random.random() < 0.3
        adapter = (
            None if leaves else make_adapter(base_of(run.model), seed=next(seeds), rank=run.random.choice((2, 4, 8)))
        )
        change = [time.monotonic(), float("inf"), adapter and adapter.fingerprint]
        action = "deleted" if adapter is None else "replaced" if person.present else "appeared"
        person.changes.append(change)
        answer = await changed(http, name, adapter)
        change[1] = time.monotonic()
        run.managed[action] += 1
        run.expect(action, answer.status_code, {200, 201}, answer.text)


async def changed(http: httpx.AsyncClient, name: str, adapter: MadeUpAdapter | None) -> httpx.Response:
    path = f"/patients/{name}/adapter"
    if adapter is None:
        return await http.delete(path)
    return await http.put(path, files={"file": ("adapter.zip", adapter.zipped(), "application/zip")})


async def watch(run: Run, http: httpx.AsyncClient, process: subprocess.Popen[bytes]) -> None:
    """Memory of the service and of what it started, and whether it says that it is well."""
    service = psutil.Process(process.pid)
    while True:
        processes = [service, *service.children(recursive=True)]
        used = 0
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                used += one.memory_info().rss
        run.memory.append((run.done, used))
        begin = time.monotonic()
        answer = await http.get("/health")
        run.health.append(time.monotonic() - begin)
        run.expect("health", answer.status_code, {200}, answer.text)
        await asyncio.sleep(1)


def summary(run: Run, wall: float) -> dict[str, Any]:
    """What is written down. Adds the faults that only the whole run shows."""
    memory = {"samples": len(run.memory)}
    quarter = run.given.requests / 4
    first = [used for done, used in run.memory if quarter / 2 <= done < 1.5 * quarter]
    last = [used for done, used in run.memory if done >= 3 * quarter]
    if first and last:
        before, after = statistics.median(first), statistics.median(last)
        memory |= {"first_quarter_mib": round(before / MEBIBYTE), "last_quarter_mib": round(after / MEBIBYTE)}
        if run.given.requests >= LEAST_FOR_MEMORY and after > before * (1 + GROWTH):
            run.faults.append(f"the memory grew: {memory}")
    answered = run.done - sum("no answer" in fault for fault in run.faults)
    return {
        "answered": answered,
        "wall_seconds": round(wall, 1),
        "requests_per_second": round(run.done / wall, 2),
        "latency_seconds": percentiles(run.seconds),
        "health_seconds": percentiles(run.health),
        "statuses": dict(sorted(run.statuses.items())),
        "asked_again_after_overload": run.repeated,
        "went_away": run.gone,
        "adapters": dict(run.managed),
        "memory": memory,
        "faults": len(run.faults),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"p{p}": round(cuts[p - 1], 3) for p in (50, 95, 99)}


if __name__ == "__main__":
    main()
