"""Adapters on disk and behind addresses: versions that appear whole, are found again, rolled back to and removed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from resonance.errors import AdapterError, DataError, ShardError
from resonance.model.lora_weights import AdapterBase, LoadedAdapter
from resonance.serve import places
from resonance.serve.faults import ServiceError
from resonance.serve.store import AdapterStore

Make = Callable[..., Path]


class Killed(BaseException):
    """The process ends here: nothing that catches errors goes on."""


@pytest.fixture
def local(tmp_path: Path) -> AdapterStore:
    (tmp_path / "adapters").mkdir()
    return AdapterStore(tmp_path / "adapters", keep=3)


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AdapterStore]:
    if request.param == "folder":
        (tmp_path / "adapters").mkdir()
        yield AdapterStore(tmp_path / "adapters", keep=3)
    elif request.param == "memory":
        memory = fsspec.filesystem("memory")
        memory.mkdir("/adapters")
        yield AdapterStore("memory://adapters", keep=3)
        memory.rm("/adapters", recursive=True)
    else:
        yield AdapterStore(request.getfixturevalue("s3") + "/adapters", keep=3)


pytestmark = pytest.mark.filterwarnings(  # of boto and moto
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def read(store: AdapterStore, patient: str, base: AdapterBase) -> LoadedAdapter:
    version = store.version(patient)
    assert version is not None
    return store.read(patient, version, base)


def copy(store: AdapterStore, source: Path, place: str) -> None:
    """File by file, as a family does it."""
    for path in source.iterdir():
        target = f"{store.place}/{place}/{path.name}"
        with fsspec.open(target, "wb", auto_mkdir=True) as stream:
            stream.write(path.read_bytes())


def fault(call: Callable[[], Any]) -> tuple[int, str]:
    with pytest.raises(ServiceError) as error:
        call()
    assert error.value.message and error.value.hint
    return error.value.status, error.value.code


def test_versions_are_put_listed_rolled_back_pruned_and_deleted(
    store: AdapterStore, make_adapter: Make, tiny_base: AdapterBase, tmp_path: Path
) -> None:
    assert store.patients() == [] and not store.has("anna") and store.version("anna") is None
    assert store.current("anna") is None and store.versions("anna") == []
    assert fault(lambda: store.roll_back("anna")) == fault(lambda: store.delete("anna")) == (404, "adapter_not_found")
    put = [store.put("anna", make_adapter(tmp_path / str(i), seed=i)) for i in range(3)]
    assert [info.name for info in store.versions("anna")] == [info.name for info in reversed(put)]
    assert store.current("anna") == put[2] and put[2].current and len({info.fingerprint for info in put}) == 3
    assert put[2].created.startswith("20") and put[2].bytes > 10_000
    adapter = read(store, "anna", tiny_base)
    assert (adapter.name, adapter.version, adapter.fingerprint) == ("anna", put[2].name, put[2].fingerprint)
    assert adapter.layers

    assert store.roll_back("anna").name == put[1].name
    assert read(store, "anna", tiny_base).fingerprint == put[1].fingerprint
    assert store.roll_back("anna").name == put[0].name
    assert fault(lambda: store.roll_back("anna")) == (409, "no_older_version")
    assert fault(lambda: store.roll_back("anna", "../../x")) == (404, "version_not_found")
    assert store.roll_back("anna", put[2].name) == put[2] == store.current("anna")

    store.roll_back("anna", put[0].name)
    store.put("anna", make_adapter(tmp_path / "more", seed=9))
    store.roll_back("anna", put[0].name)
    for i in range(4):  # three old ones stay beside the current one, and with them no other
        newest = store.put("anna", make_adapter(tmp_path / f"more{i}", seed=10 + i))
    kept = store.versions("anna")
    assert len(kept) == 4 and kept[0] == newest and put[0].name not in {info.name for info in kept}

    store.put("bert", tmp_path / "0")
    assert store.patients() == ["anna", "bert"]
    store.delete("anna")
    assert store.patients() == ["bert"] and not store.has("anna") and store.versions("anna") == []
    assert read(store, "bert", tiny_base).fingerprint == put[0].fingerprint


def test_the_current_version_is_never_pruned(local: AdapterStore, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "one")
    first = local.put("anna", folder)
    for _ in range(3):
        local.put("anna", folder)
    local.roll_back("anna", first.name)
    local._prune("anna", first.name)
    assert local.current("anna") is not None and len(local.versions("anna")) == 4


def test_a_folder_that_somebody_copies_there_answers_and_is_found_changed(
    store: AdapterStore, make_adapter: Make, tiny_base: AdapterBase, tmp_path: Path
) -> None:
    copy(store, make_adapter(tmp_path / "a", seed=1), "anna")
    copy(store, make_adapter(tmp_path / "b", seed=2), "bert/adapter")  # a run folder
    anna, bert = read(store, "anna", tiny_base), read(store, "bert", tiny_base)
    assert store.patients() == ["anna", "bert"] and anna.fingerprint != bert.fingerprint
    info = store.current("anna")
    assert info is not None and (info.name, info.fingerprint) == (anna.version, anna.fingerprint)
    assert info.created == "2026-01-01T00:00:00+00:00" and info.bytes > 10_000
    assert store.version("anna") == anna.version  # nothing has changed
    copy(store, make_adapter(tmp_path / "c", seed=3), "anna")
    changed = read(store, "anna", tiny_base)
    assert changed.version != anna.version and changed.fingerprint != anna.fingerprint
    with pytest.raises(AdapterError, match="changed while it was read"):
        store.read("anna", anna.version, tiny_base)

    put = store.put("anna", tmp_path / "b")
    assert read(store, "anna", tiny_base).fingerprint == bert.fingerprint == put.fingerprint
    assert [info.name for info in store.versions("anna")] == [put.name, changed.version]
    assert store.roll_back("anna").name == changed.version == store.version("anna")
    store.roll_back("anna", put.name)
    store.delete("anna")  # what lies there itself does not come back
    store.delete("bert")
    assert store.patients() == [] and not store.has("anna") and not store.has("bert")


def test_deleting_an_adapter_leaves_the_rest_of_a_training(
    local: AdapterStore, make_adapter: Make, tmp_path: Path
) -> None:
    run = tmp_path / "adapters" / "anna"
    make_adapter(run / "adapter")
    (run / "checkpoint-9").mkdir()
    (run / "events.jsonl").write_text("{}")
    local.delete("anna")
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-9", "events.jsonl"]
    assert not local.has("anna") and local.patients() == []
    elsewhere = make_adapter(tmp_path / "elsewhere")
    (tmp_path / "adapters" / "bert").symlink_to(elsewhere)
    assert local.has("bert")
    local.delete("bert")
    assert not local.has("bert") and (elsewhere / "adapter_config.json").is_file()


def test_a_training_that_replaces_its_adapter_is_not_taken_for_a_deletion(
    local: AdapterStore, make_adapter: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "adapters" / "anna"
    adapter = make_adapter(run / "adapter")
    aside = adapter.rename(run / "adapter.1")
    monkeypatch.setattr(time, "sleep", lambda _seconds: aside.rename(adapter))
    assert local.version("anna") is not None


@pytest.mark.parametrize("torn", ["adapter_model.safetensors", "tokenizer.json", "resonance.json", "checksums.json"])
@pytest.mark.parametrize("how", ["cut", "changed", "missing"])
def test_a_torn_version_is_refused_and_one_cannot_roll_back_to_it(
    torn: str, how: str, local: AdapterStore, make_adapter: Make, tiny_base: AdapterBase, tmp_path: Path
) -> None:
    first = local.put("anna", make_adapter(tmp_path / "a", seed=1))
    second = local.put("anna", make_adapter(tmp_path / "b", seed=2))
    path = tmp_path / "adapters/anna/versions" / second.name / torn
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if how == "cut" else data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(AdapterError) as error:
        local.read("anna", second.name, tiny_base)
    assert "anna" in str(error.value) and str(tmp_path) not in str(error.value)
    assert local.roll_back("anna", first.name).fingerprint == read(local, "anna", tiny_base).fingerprint
    status, code = fault(lambda: local.roll_back("anna", second.name))
    assert (status, code) in ((422, "adapter_unusable"), (404, "version_not_found"))
    assert local.version("anna") == first.name


@pytest.mark.parametrize("text", [b"", b"../../etc", b"a/b", b"\xff\xfe", b"folder-123", b"x" * 100_000])
def test_a_current_that_names_no_version_leads_nowhere(
    text: bytes, local: AdapterStore, make_adapter: Make, tmp_path: Path
) -> None:
    local.put("anna", make_adapter(tmp_path / "a"))
    (tmp_path / "adapters/anna/current").write_bytes(text)
    with pytest.raises(AdapterError, match="anna is damaged: current"):
        local.version("anna")
    assert local.has("anna") and local.patients() == ["anna"]


def steps_of(monkeypatch: pytest.MonkeyPatch, owners: list[tuple[Any, str]], stop: int) -> list[int]:
    """Count calls of these functions, and end the process in the one with the number `stop`."""
    count = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == stop:
                raise Killed
            return real(*args, **kwargs)

        return step

    for owner, name in owners:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return count


@pytest.mark.parametrize("where", ["folder", "memory"])
def test_whoever_is_killed_while_storing_leaves_the_old_version_or_the_new_one(
    where: str, make_adapter: Make, tiny_base: AdapterBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make_adapter(tmp_path / "old", seed=1), make_adapter(tmp_path / "new", seed=2)
    if where == "folder":
        owners = [(os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir")]
        monkeypatch.setattr(os, "fsync", lambda _handle: None)  # seconds in all; no power fails here
    else:
        from fsspec.implementations.memory import MemoryFileSystem

        owners = [(MemoryFileSystem, "pipe_file"), (MemoryFileSystem, "put_file"), (MemoryFileSystem, "rm")]
        fsspec.filesystem("memory").mkdir("/crash")
    seen = set()
    for stop in range(1, 200):
        (tmp_path / f"{stop}").mkdir()
        store = AdapterStore(tmp_path / f"{stop}" if where == "folder" else f"memory://crash/{stop}", keep=0)
        with monkeypatch.context() as patch:
            steps_of(patch, owners, stop)
            with contextlib.suppress(Killed):
                store.put("bert", new)
        if store.has("bert"):  # nobody, or somebody whole
            assert read(store, "bert", tiny_base).name == "bert"
        before = store.put("anna", old)
        with monkeypatch.context() as patch:
            count = steps_of(patch, owners, stop)
            with contextlib.suppress(Killed):
                store.put("anna", new)
        after = read(store, "anna", tiny_base)
        seen.add(after.fingerprint == before.fingerprint)
        assert store.patients()[0] == "anna"
        again = store.put("anna", new)  # what was left behind is in nobody's way
        assert read(store, "anna", tiny_base).version == again.name and again.fingerprint in {
            after.fingerprint,
            again.fingerprint,
        }
        if count[0] < stop:
            break
    assert seen == {True, False} and count[0] >= 9  # all steps were stopped at once
    if where == "memory":
        fsspec.filesystem("memory").rm("/crash", recursive=True)


def test_a_full_disk_is_an_error_that_leaves_the_old_version(
    local: AdapterStore, make_adapter: Make, tiny_base: AdapterBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = local.put("anna", make_adapter(tmp_path / "a", seed=1))
    second = make_adapter(tmp_path / "b", seed=2)

    def full(*_args: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("_write", "_sync_folder"):
        with monkeypatch.context() as patch:
            patch.setattr(places, name, full)
            with pytest.raises(DataError, match="No space left"):
                local.put("anna", second)
        assert read(local, "anna", tiny_base).version == first.name
    assert [path.name for path in (tmp_path / "adapters/anna/versions").iterdir()] == [first.name]


def test_what_killed_processes_leave_is_cleared_an_hour_later(
    local: AdapterStore, make_adapter: Make, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "a")
    local.put("anna", folder)
    versions = tmp_path / "adapters/anna/versions"
    for name in (".old.part", ".new.part"):
        (versions / name).mkdir()
    os.utime(versions / ".old.part", (1, 1))
    cut_off = versions / "20200101T000000000000-aaaaaaaa"
    cut_off.mkdir()
    local.put("anna", folder)
    assert not (versions / ".old.part").exists() and (versions / ".new.part").exists() and not cut_off.exists()


def test_only_what_an_adapter_is_made_of_is_stored(local: AdapterStore, make_adapter: Make, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    for name in ("run.sh", "optimizer.pt", "adapter_model.bin", ".hidden.json", "x y.json"):
        (folder / name).write_text("#!/bin/sh")
    (folder / "link.json").symlink_to("/etc/hostname")
    (folder / "checksums.json").write_text("{}")
    info = local.put("anna", folder)
    names = {path.name for path in (tmp_path / "adapters/anna/versions" / info.name).iterdir()}
    assert names == {
        *("adapter_config.json", "adapter_model.safetensors", "resonance.json", "tokenizer.json", "checksums.json"),
        *(
            name
            for name in ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
            if (folder / name).is_file()
        ),
    }
    sums = json.loads((tmp_path / "adapters/anna/versions" / info.name / "checksums.json").read_text())
    assert sums["files"].keys() == names - {"checksums.json"}
    (folder / "resonance.json").unlink()
    with pytest.raises(AdapterError, match=r"missing: resonance\.json"):
        local.put("anna", folder)


def test_no_id_leads_out_of_the_folder(
    local: AdapterStore, make_adapter: Make, tiny_base: AdapterBase, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "secret")
    for call in (
        lambda: local.has("../secret"),
        lambda: local.version("../secret"),
        lambda: local.current("../secret"),
        lambda: local.versions("../secret"),
        lambda: local.put("../new", folder),
        lambda: local.roll_back("../secret"),
        lambda: local.delete("../secret"),
        lambda: local.read("../secret", "x", tiny_base),
    ):
        assert fault(call) == (400, "invalid_patient_id")
    assert (folder / "resonance.json").is_file() and not (tmp_path / "new").exists()


def test_ten_thousand_people_are_listed_by_pages_without_reading_adapters(
    crowd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: Path) -> bytes:
        raise FileNotFoundError(path)

    store, found = AdapterStore(crowd), list[str]()
    monkeypatch.setattr(Path, "open", lambda path, *_a, **_k: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(Path, "read_bytes", lambda path: missing(path) if path.name == "current" else path.open())
    began = time.perf_counter()
    while page := store.patients(found[-1] if found else None, 1000):
        found += page
    assert time.perf_counter() - began < 5
    assert found == [f"p{i:05}" for i in range(10_000)]
    assert store.patients("p00009", 2) == ["p00010", "p00011"]


def test_what_holds_no_adapter_is_not_listed(local: AdapterStore, make_adapter: Make, tmp_path: Path) -> None:
    for name in (".trash", "no id", "empty", "unfinished/versions/v1", "file"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
    (tmp_path / "adapters" / "readme").write_text("not a person")
    local.put("anna", make_adapter(tmp_path / "a"))
    assert local.patients() == ["anna"] and not local.has("readme") and local.version("unfinished") is None


def test_a_link_to_itself_hides_nobody(local: AdapterStore, make_adapter: Make, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    local.put("anna", make_adapter(tmp_path / "a"))
    (folder / "loop").symlink_to("loop")
    (folder / "anna" / "loop").symlink_to("loop")
    (folder / "bad").mkdir()
    (folder / "bad" / "current").symlink_to("current")
    assert local.patients() == ["anna", "bad"] and local.has("anna")


def test_when_it_was_stored_is_told_without_reading_weights(
    local: AdapterStore, make_adapter: Make, tmp_path: Path
) -> None:
    folder = make_adapter(tmp_path / "adapters" / "anna")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("nowhere")
    assert local.created("anna") == "2026-01-01T00:00:00+00:00" and local.created("nobody") is None
    assert local.created("bert") is None
    put = local.put("bert", make_adapter(tmp_path / "b"))
    assert local.created("bert") == put.created
    (folder / "resonance.json").write_text('{"created": "x"}' + " " * (1 << 20))
    assert local.created("anna") == ""


def test_a_place_that_is_not_there_or_is_an_adapter_itself_is_refused_at_once(
    make_adapter: Make, tmp_path: Path, s3: str
) -> None:
    with pytest.raises(DataError, match="absent: no such folder"):
        AdapterStore(tmp_path / "absent")
    with pytest.raises(AdapterError, match="an adapter itself"):
        AdapterStore(make_adapter(tmp_path / "a"))
    with pytest.raises(ShardError, match="s3://absent/adapters"):
        AdapterStore("s3://absent/adapters")
    AdapterStore(s3)
