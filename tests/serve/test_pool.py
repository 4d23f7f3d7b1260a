"""Adapters in memory: loaded once, kept within a budget, never changed under those who use them, never another person's."""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from resonance.errors import UnreachableError
from resonance.model.lora_weights import AdapterBase, LoadedAdapter
from resonance.serve.faults import ServiceError
from resonance.serve.pool import AdapterPool
from resonance.serve.store import AdapterStore

Make = Callable[..., Path]
WEIGHTS = "adapter_model.safetensors"


class Clock:
    """Seconds that pass when the test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class CountingStore(AdapterStore):
    """Counts what is asked for, and can hold up or fail a reading."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.reads: list[str] = []
        self.looks = 0
        self.before_read: Callable[[str], Any] = lambda _patient: None
        self.unreachable = False

    def version(self, patient: str) -> str | None:
        self.looks += 1
        if self.unreachable:
            raise UnreachableError("s3://voices: connection refused")
        return super().version(patient)

    def read(self, patient: str, version: str, base: AdapterBase) -> LoadedAdapter:
        self.reads.append(patient)
        self.before_read(patient)
        return super().read(patient, version, base)


@pytest.fixture
def store(tmp_path: Path) -> CountingStore:
    (tmp_path / "adapters").mkdir()
    return CountingStore(tmp_path / "adapters")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make_pool(store: CountingStore, clock: Clock, tiny_base: AdapterBase) -> Callable[..., AdapterPool]:
    """A pool over `store` whose adapters may change every two seconds; `budget` in bytes."""
    return lambda budget=1 << 30, refresh=2.0: AdapterPool(store, tiny_base, budget, refresh, clock=clock)


@pytest.fixture
def people(store: CountingStore, make_adapter: Make, tmp_path: Path) -> list[str]:
    """Five people with adapters of `SIZE` bytes."""
    names = ["anna", "bert", "carl", "dora", "emil"]
    for i, name in enumerate(names):
        store.put(name, make_adapter(tmp_path / name, seed=i))
    return names


SIZE = 12 * 2 * 32 * 4 * 4  # layers, A and B, width, rank, bytes


def fault(call: Callable[[], Any]) -> ServiceError:
    with pytest.raises(ServiceError) as error:
        call()
    assert error.value.message and error.value.hint and "{" not in error.value.message
    return error.value


@contextlib.contextmanager
def holding(pool: AdapterPool, patient: str) -> Iterator[LoadedAdapter]:
    adapter = pool.acquire(patient)
    try:
        yield adapter
    finally:
        pool.release(adapter)


def together(count: int, call: Callable[[int], Any]) -> list[Any]:
    """What `call` gives or raises in so many threads that begin at once."""
    barrier = threading.Barrier(count)

    def one(i: int) -> Any:
        barrier.wait()
        try:
            return call(i)
        except ServiceError as error:
            return error

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(one, range(count)))


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.01)


def test_sixteen_who_ask_at_once_share_one_load(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool]
) -> None:
    store.before_read = lambda _patient: time.sleep(0.05)
    pool = make_pool()
    found = together(16, lambda _i: pool.acquire("anna"))
    assert len(set(found)) == 1 and found[0].name == "anna" and store.reads == ["anna"]
    assert (pool.stats().loaded, pool.stats().pinned, pool.stats().loads, pool.stats().misses) == (1, 1, 1, 1)
    for adapter in found:
        pool.release(adapter)
    assert pool.stats().pinned == 0 and pool.stats().bytes == SIZE
    with pytest.raises(ValueError, match="more often"):
        pool.release(found[0])
    with holding(pool, "anna") as adapter:
        assert adapter is found[0] and pool.stats().hits == 1 and pool.stats().pinned == 1
    assert pool.stats().pinned == 0


def test_sixteen_who_ask_for_a_broken_one_share_one_load_and_its_error(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool], clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "adapters/anna/current").write_text("20200101T000000000000-00000000")
    store.before_read = lambda _patient: time.sleep(0.05)
    pool = make_pool()
    errors = together(16, lambda _i: pool.acquire("anna"))
    assert {(error.status, error.code) for error in errors} == {(422, "adapter_unusable")}
    assert len({id(error) for error in errors}) == 16 and store.reads == ["anna"]
    assert "20200101T000000000000-00000000" in errors[0].message
    for _ in range(50):  # a storm does not read it again
        assert fault(lambda: pool.acquire("anna")).code == "adapter_unusable"
    assert store.reads == ["anna"] and pool.stats().loads_failed == 1 and pool.stats().loaded == 0
    store.roll_back("anna", store.versions("anna")[0].name)
    clock.now += 2
    with holding(pool, "anna") as adapter:
        assert adapter.name == "anna"
    assert pool.stats().loads_failed == 1


def test_different_adapters_are_loaded_at_the_same_time(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool]
) -> None:
    meeting = threading.Barrier(4, timeout=10)
    store.before_read = lambda _patient: meeting.wait()
    pool = make_pool()
    found = together(4, lambda i: pool.acquire(people[i]))
    assert [adapter.name for adapter in found] == people[:4]


def test_those_not_used_for_longest_make_room(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool]
) -> None:
    pool = make_pool(3 * SIZE)
    for name in (*people[:3], "anna", "dora"):
        with holding(pool, name):
            pass
    assert pool.stats().evictions == 1 and pool.stats().bytes == 3 * SIZE
    store.reads.clear()
    for name in ("anna", "carl", "dora"):
        with holding(pool, name):
            pass
    assert store.reads == []
    with holding(pool, "bert") as bert, holding(pool, "anna") as anna:
        assert bert.name == "bert" and anna.name == "anna"
    assert store.reads == ["bert", "anna"]


def test_adapters_in_use_are_never_let_go_and_a_full_memory_is_said_with_a_time_to_try_again(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool]
) -> None:
    pool = make_pool(2 * SIZE + SIZE // 2)
    anna, bert = pool.acquire("anna"), pool.acquire("bert")
    values = anna.layers["model.encoder.layers.0.self_attn.q_proj"][0].clone()
    for _ in range(20):
        error = fault(lambda: pool.acquire("carl"))
        assert (error.status, error.code) == (503, "adapter_memory_full") and error.retry_after == 1
    assert pool.stats().bytes == 2 * SIZE and pool.stats().loaded == 2
    assert store.reads.count("carl") == 1  # what there is no room for is not read again and again
    assert pool.acquire("anna") is anna and torch.equal(
        values, anna.layers["model.encoder.layers.0.self_attn.q_proj"][0]
    )
    pool.release(bert)
    with holding(pool, "carl") as carl:  # at once, without waiting
        assert carl.name == "carl" and pool.stats().loaded == 2
    pool.release(anna)
    with holding(pool, "bert"):
        assert pool.acquire("anna") is anna  # one of two pins is left


def test_an_adapter_larger_than_all_the_memory_is_refused_for_good(
    people: list[str], make_pool: Callable[..., AdapterPool], tmp_path: Path
) -> None:
    pool = make_pool(SIZE - 1)
    error = fault(lambda: pool.acquire("anna"))
    assert (error.status, error.retry_after) == (422, None) and "--adapter_memory" in error.hint
    assert fault(lambda: pool.check(tmp_path / "anna")).status == 422


def test_a_retrained_adapter_answers_after_the_refresh_time_and_rows_under_way_keep_the_old_one(
    store: CountingStore,
    people: list[str],
    make_pool: Callable[..., AdapterPool],
    make_adapter: Make,
    clock: Clock,
    tmp_path: Path,
) -> None:
    pool = make_pool()
    old = pool.acquire("anna")
    before = {name: (a.clone(), b.clone()) for name, (a, b) in old.layers.items()}
    put = store.put("anna", make_adapter(tmp_path / "new", seed=77))
    looks = store.looks
    clock.now += 1.9
    assert pool.acquire("anna") is old and store.looks == looks
    clock.now += 0.1
    new = pool.acquire("anna")
    assert (new.version, new.fingerprint) == (put.name, put.fingerprint) and new is not old
    assert pool.stats().loaded == 2 and pool.stats().bytes == 2 * SIZE
    for name, (a, b) in old.layers.items():
        assert torch.equal(a, before[name][0]) and torch.equal(b, before[name][1])
    pool.release(old)
    assert pool.stats().loaded == 2
    pool.release(old)
    assert pool.stats().loaded == 1 and pool.stats().bytes == SIZE
    pool.release(new)
    store.roll_back("anna")
    pool.changed("anna")  # the service that has changed it itself need not wait
    with holding(pool, "anna") as back:
        assert back.fingerprint == old.fingerprint


def test_while_a_new_version_is_read_the_old_one_answers(
    store: CountingStore,
    people: list[str],
    make_pool: Callable[..., AdapterPool],
    make_adapter: Make,
    clock: Clock,
    tmp_path: Path,
) -> None:
    pool = make_pool()
    old = pool.acquire("anna")
    pool.release(old)
    put = store.put("anna", make_adapter(tmp_path / "new", seed=77))
    clock.now += 2
    reading, go_on = threading.Event(), threading.Event()

    def hold_up(_patient: str) -> None:
        reading.set()
        assert go_on.wait(10)

    store.before_read = hold_up
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(pool.acquire, "anna")
        assert reading.wait(10)
        with holding(pool, "anna") as meanwhile:
            assert meanwhile is old
        go_on.set()
        assert first.result().version == put.name
    assert pool.stats().loaded == 1 and store.reads == ["anna", "anna"]


@pytest.mark.parametrize("damage", ["weights", "checksums", "another base", "gone", "current"])
def test_a_bad_new_version_leaves_the_last_good_one_and_says_why(
    damage: str,
    store: CountingStore,
    people: list[str],
    make_pool: Callable[..., AdapterPool],
    make_adapter: Make,
    clock: Clock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = make_pool()
    with holding(pool, "anna") as good:
        pass
    other = {"base_fingerprint": "0" * 64} if damage == "another base" else {}
    bad = store.put("anna", make_adapter(tmp_path / "bad", seed=78, **other))
    place = tmp_path / "adapters/anna/versions" / bad.name
    if damage == "weights":
        data = (place / WEIGHTS).read_bytes()
        (place / WEIGHTS).write_bytes(data[:-50] + bytes(50))
    elif damage == "checksums":
        (place / "checksums.json").unlink()
    elif damage == "gone":
        place.rename(tmp_path / "gone")
    elif damage == "current":
        (tmp_path / "adapters/anna/current").write_text("../../../etc")
    clock.now += 2
    for _ in range(3):
        with holding(pool, "anna") as adapter:
            assert adapter is good
    assert pool.stats().behind == 1 and pool.stats().loads_failed == 1
    (warning,) = [record.getMessage() for record in caplog.records if "goes on answering" in record.getMessage()]
    reason = warning.partition("cannot be used. ")[2]
    assert "anna" in reason and str(tmp_path) not in reason and good.version in warning
    clock.now += 2  # looked at again, and said once
    with holding(pool, "anna"):
        pass
    assert caplog.text.count(reason) == 1
    better = store.put("anna", make_adapter(tmp_path / "better", seed=79))
    clock.now += 2
    with holding(pool, "anna") as adapter:
        assert adapter.version == better.name
    assert pool.stats().behind == 0


def test_a_deleted_adapter_stops_answering_and_is_never_replaced_by_another(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool], clock: Clock
) -> None:
    pool = make_pool()
    under_way = pool.acquire("anna")
    store.delete("anna")
    clock.now += 2
    error = fault(lambda: pool.acquire("anna"))
    assert (error.status, error.code) == (404, "adapter_not_found")
    assert under_way.layers and pool.stats().loaded == 1
    pool.release(under_way)
    assert pool.stats().loaded == 0 and pool.stats().bytes == 0
    with holding(pool, "bert"):
        pass
    store.delete("bert")
    pool.changed("bert")
    assert fault(lambda: pool.acquire("bert")).status == 404
    assert fault(lambda: pool.acquire("nobody")).status == 404
    assert fault(lambda: pool.acquire("../bert")).status == 400
    assert pool.stats().loads_failed == 0


def test_one_that_was_not_there_is_found_when_it_was_stored(
    store: CountingStore, make_pool: Callable[..., AdapterPool], make_adapter: Make, clock: Clock, tmp_path: Path
) -> None:
    pool = make_pool()
    assert fault(lambda: pool.acquire("anna")).status == 404
    folder = make_adapter(tmp_path / "a")
    assert pool.check(folder).layers and pool.stats().loaded == 0
    put = store.put("anna", folder)
    assert fault(lambda: pool.acquire("anna")).status == 404  # asked a moment ago
    pool.changed("anna")
    with holding(pool, "anna") as adapter:
        assert adapter.version == put.name


def test_a_look_that_began_before_a_change_answers_only_those_who_asked_before_it(
    store: CountingStore,
    people: list[str],
    make_pool: Callable[..., AdapterPool],
    make_adapter: Make,
    clock: Clock,
    tmp_path: Path,
) -> None:
    pool = make_pool()
    reading, go_on = threading.Event(), threading.Event()

    def hold_up(_patient: str) -> None:
        if len(store.reads) == 1:
            reading.set()
            assert go_on.wait(10)

    store.before_read = hold_up
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(pool.acquire, "anna")
        assert reading.wait(10)
        put = store.put("anna", make_adapter(tmp_path / "new", seed=77))
        pool.changed("anna")
        new = pool.acquire("anna")
        assert new.version == put.name
        go_on.set()
        old = first.result()
    assert old.version != new.version and pool.stats().loaded == 2
    with holding(pool, "anna") as still:
        assert still is new
    pool.release(old)
    assert pool.stats().loaded == 1
    pool.release(new)
    assert pool.stats().bytes == SIZE and pool.stats().pinned == 0


def test_after_a_change_nobody_is_answered_by_what_was_there_before(
    store: CountingStore,
    people: list[str],
    make_pool: Callable[..., AdapterPool],
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    pool = make_pool()
    old = pool.acquire("anna")
    store.before_read = lambda _patient: time.sleep(0.1)
    put = store.put("anna", make_adapter(tmp_path / "new", seed=77))
    pool.changed("anna")
    found = together(8, lambda _i: pool.acquire("anna"))
    assert {adapter.version for adapter in found} == {put.name} and store.reads == ["anna", "anna"]
    for adapter in (old, *found):
        pool.release(adapter)
    assert pool.stats().loaded == 1 and pool.stats().bytes == SIZE and pool.stats().pinned == 0
    store.unreachable = True
    pool.changed("anna")  # who knows what was changed
    assert fault(lambda: pool.acquire("anna")).code == "adapter_store_unreachable"


def test_a_change_of_a_change_leaves_one_adapter_in_memory(
    store: CountingStore,
    people: list[str],
    make_pool: Callable[..., AdapterPool],
    make_adapter: Make,
    tmp_path: Path,
) -> None:
    pool = make_pool()
    pool.release(pool.acquire("anna"))
    store.before_read = lambda _patient: time.sleep(0.05)
    for seed in (77, 78, 79):
        put = store.put("anna", make_adapter(tmp_path / str(seed), seed=seed))
        pool.changed("anna")
    with holding(pool, "anna") as adapter:
        assert adapter.version == put.name
    until(lambda: pool.stats().loaded == 1 and pool.stats().bytes == SIZE and pool.stats().pinned == 0)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No thread can be started, as where there are as many processes as there may be, until this is called."""

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    return monkeypatch.undo


def test_a_thread_that_cannot_be_started_leaves_nobody_waiting_for_ever(
    make_pool: Callable[..., AdapterPool], people: list[str], clock: Clock, no_threads: Callable[[], None]
) -> None:
    pool = make_pool()

    def submit(function: Callable[[], None]) -> None:
        threading.Thread(target=function).start()

    coming = pool.ask("anna", submit)
    assert fault(lambda: coming.result(0)).code == "adapter_store_unreachable"
    no_threads()
    clock.now += 3
    adapter = pool.ask("anna", submit).result(30)
    assert adapter.name == "anna"
    pool.release(adapter)


def test_a_change_that_no_thread_can_follow_lets_go_of_what_was_there_and_is_followed_later(
    make_pool: Callable[..., AdapterPool],
    store: CountingStore,
    people: list[str],
    make_adapter: Make,
    tmp_path: Path,
    clock: Clock,
    request: pytest.FixtureRequest,
) -> None:
    pool = make_pool()
    pool.release(pool.acquire("anna"))
    store.put("anna", make_adapter(tmp_path / "new", seed=9))
    again: Callable[[], None] = request.getfixturevalue("no_threads")
    pool.changed("anna")
    assert (pool.stats().loaded, pool.stats().pinned, pool.stats().bytes) == (0, 0, 0)
    assert fault(lambda: pool.acquire("anna")).code == "adapter_store_unreachable"
    again()
    clock.now += 3
    with holding(pool, "anna") as adapter:
        assert adapter.version == store.version("anna")


def test_what_was_deleted_leaves_the_memory_though_nobody_asks_for_it(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool]
) -> None:
    pool = make_pool()
    pool.release(pool.acquire("anna"))
    store.delete("anna")
    pool.changed("anna")
    until(lambda: pool.stats().loaded == 0 and pool.stats().bytes == 0)


def test_a_store_out_of_reach_stops_nobody_who_is_in_memory(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool], clock: Clock
) -> None:
    pool = make_pool()
    with holding(pool, "anna") as anna:
        pass
    store.unreachable = True
    clock.now += 2
    with holding(pool, "anna") as again:
        assert again is anna
    error = fault(lambda: pool.acquire("bert"))
    assert (error.status, error.code, error.retry_after) == (503, "adapter_store_unreachable", 2)
    assert "s3://" not in error.message + error.hint
    store.unreachable = False
    clock.now += 2
    with holding(pool, "bert"), holding(pool, "anna"):
        assert pool.stats().behind == 0


def test_an_upload_is_checked_as_it_would_be_loaded(
    make_pool: Callable[..., AdapterPool], make_adapter: Make, tmp_path: Path
) -> None:
    pool = make_pool()
    folder = make_adapter(tmp_path / "upload")
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04")
    error = fault(lambda: pool.check(folder))
    assert (error.status, error.code) == (422, "adapter_unusable")
    assert WEIGHTS in error.message and str(tmp_path) not in error.message


def test_a_fault_of_the_program_is_no_answer_and_stops_nobody_else(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool]
) -> None:
    def fail(patient: str) -> None:
        if patient == "anna":
            raise RuntimeError("not foreseen")

    store.before_read = fail
    pool = make_pool()
    assert {error.code for error in together(4, lambda _i: pool.acquire("anna"))} == {"adapter_unusable"}
    with holding(pool, "bert") as bert:
        assert bert.name == "bert"


def test_a_version_that_is_pruned_while_it_is_read_gives_way_to_the_next(
    store: CountingStore, people: list[str], make_pool: Callable[..., AdapterPool], make_adapter: Make, tmp_path: Path
) -> None:
    new = make_adapter(tmp_path / "new", seed=99)

    def replace(_patient: str) -> None:
        if len(store.reads) == 1:
            store.put("anna", new)
            store._keep = 0
            store._prune("anna", store.version("anna") or "")

    store.before_read = replace
    with holding(make_pool(), "anna") as adapter:
        assert adapter.version == store.version("anna")


def test_under_traffic_everybody_gets_their_own_adapter_and_the_budget_holds(
    store: CountingStore, people: list[str], tiny_base: AdapterBase, make_adapter: Make, tmp_path: Path
) -> None:
    pool = AdapterPool(store, tiny_base, 3 * SIZE, 0.01)
    retrained = [make_adapter(tmp_path / f"r{i}", seed=500 + i) for i in range(4)]
    known = {name: {store.versions(name)[0].fingerprint} for name in people}
    over: list[int] = []
    end = time.monotonic() + 2

    def talk(i: int) -> tuple[int, int]:
        choice, answered, refused = random.Random(i), 0, 0
        while time.monotonic() < end:
            name = choice.choice(people)
            try:
                with holding(pool, name) as adapter:
                    assert adapter.name == name and adapter.fingerprint in known[name]
                    over.append(pool.stats().bytes)
                    answered += 1
            except ServiceError as error:
                assert error.code == "adapter_memory_full"
                refused += 1
        return answered, refused

    def train() -> None:
        for folder in retrained:
            for name in people[:2]:
                info = pool.check(folder)
                known[name].add(info.fingerprint)
                store.put(name, folder)
            time.sleep(0.3)

    with ThreadPoolExecutor(9) as threads:
        training = threads.submit(train)
        counts = list(threads.map(talk, range(8)))
        training.result()
    assert all(answered > 10 for answered, _refused in counts)
    assert max(over) <= 3 * SIZE
    stats = pool.stats()
    assert stats.pinned == 0 and stats.evictions > 0 and stats.loads_failed == 0


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_ten_thousand_on_disk_and_a_hundred_in_memory_stay_flat(crowd: Path, tiny_base: AdapterBase) -> None:
    most = 100 * SIZE // 4 * 8  # a hundred of rank 8, the largest
    pool, choice = AdapterPool(AdapterStore(crowd), tiny_base, most, 3600.0), random.Random(0)
    seen, loads = [], 0
    for _quarter in range(4):
        for _ in range(700):
            with holding(pool, f"p{choice.randrange(10_000):05}"):
                loads += 1
        seen.append(resident_mib())
    stats = pool.stats()
    assert stats.loads > 2_500 and stats.evictions > 2_000 and 100 <= stats.loaded < 400
    assert stats.bytes <= most and len(pool._slots) <= stats.loaded + 1
    assert max(seen[1:]) - seen[0] < 50, seen


def test_ids_that_somebody_tries_out_do_not_fill_the_memory(
    store: CountingStore, make_pool: Callable[..., AdapterPool]
) -> None:
    pool = make_pool()
    for i in range(2_500):
        assert fault(lambda i=i: pool.acquire(f"guess{i}")).status == 404  # type: ignore[misc]
    assert len(pool._slots) <= 1_001
