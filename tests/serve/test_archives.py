"""An adapter's zip archive is unpacked below its folder or refused, whatever the archive claims."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resonance.serve.archives import unpack
from resonance.serve.faults import ServiceError

ADAPTER = {
    "adapter_config.json": b'{"r": 8}',
    "adapter_model.safetensors": bytes(range(256)) * 4000,
    "resonance.json": b"{}",
    "merges.txt": b"a b\n",
}


def packed(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return memory.getvalue()


def with_entry(info: zipfile.ZipInfo, content: bytes = b"{}") -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr(info, content)
    return memory.getvalue()


def refusal(data: bytes, folder: Path, max_bytes: int = 20_000_000, max_files: int = 64) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        unpack(data, folder, max_bytes, max_files)
    assert {path for path in folder.parent.rglob("*") if folder not in path.parents} == {folder}
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With nothing beside it, so that what is written beside it shows."""
    folder = tmp_path / "inner"
    folder.mkdir()
    return folder


def found(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("around", ["", "anna/", "runs/anna/adapter/"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_adapter_folder_is_unpacked_with_or_without_folders_around_it(
    folder: Path, around: str, method: int
) -> None:
    unpack(packed({around + name: content for name, content in ADAPTER.items()}, method), folder, 20_000_000)
    assert found(folder) == ADAPTER


def test_what_systems_add_to_folders_is_left_out(folder: Path) -> None:
    extra = {"__MACOSX/anna/._resonance.json": b"x", "anna/.DS_Store": b"x", "anna/Thumbs.db": b"x"}
    unpack(packed({**{f"anna/{name}": content for name, content in ADAPTER.items()}, **extra}), folder, 20_000_000)
    assert found(folder) == ADAPTER


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "a/../../x.json",
        "/etc/x.json",
        "//x.json",
        "C:/x.json",
        "C:x.json",
        "a\\..\\x.json",
        "./x.json",
        "a/./x.json",
        ".hidden.json",
        "x\nERROR.json",
        "x\u202ejson.json",
        "x.json ",
        "x.json.",
        "a/b/c/d/e.json",
        "checkpoint-10/x.json",  # the store would leave it out
        "x" * 200 + ".json",
        "x.bin",
        "x.pt",
        "adapter_model.pkl",
        "x.py",
        "x.so",
        "json",
        "x.zip",
        "x.yaml",  # the store would leave it out
        "x.JSON",
    ],
)
def test_names_that_lead_elsewhere_or_are_no_adapters_files_are_refused(folder: Path, name: str) -> None:
    fault = refusal(packed({**ADAPTER, name: b"{}"}), folder)
    assert (fault.status, fault.code, fault.param) == (422, "archive_refused", "file")
    assert not found(folder)
    assert fault.message.isprintable()
    assert len(fault.message) < 250


def test_a_name_that_is_cut_off_at_a_null_character_is_refused(folder: Path) -> None:
    data = packed({"x.jsonQ../../y": b"{}"}).replace(b"x.jsonQ", b"x.json\0")
    assert refusal(data, folder).code == "archive_refused"


@pytest.mark.parametrize(
    "names",
    [("a.json", "A.json"), ("é.json", "e\u0301.json"), ("a.json", "a.json/b.json")],
    ids=["case", "composed", "file and folder"],
)
def test_two_files_of_one_name_are_refused(folder: Path, names: tuple[str, str]) -> None:
    assert refusal(packed(dict.fromkeys(names, b"{}")), folder).code == "archive_refused"


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(folder: Path) -> None:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("a.json", b"{}")
        archive.writestr("a.json", b"[]")
    assert refusal(memory.getvalue(), folder).code == "archive_refused"


@pytest.mark.parametrize("kind", [0o120777, 0o020666, 0o010666, 0o060666], ids=["symlink", "device", "pipe", "block"])
def test_what_is_no_plain_file_is_refused(folder: Path, kind: int) -> None:
    info = zipfile.ZipInfo("x.json")
    info.external_attr = kind << 16
    assert refusal(with_entry(info, b"/etc/passwd"), folder).code == "archive_refused"


def test_encrypted_and_unusually_compressed_files_are_refused(folder: Path) -> None:
    data = bytearray(packed({"x.json": b"{}"}))
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    assert "encrypted" in refusal(bytes(data), folder).message
    assert refusal(packed({"x.json": b"{}"}, zipfile.ZIP_LZMA), folder).code == "archive_refused"


def test_a_bomb_is_stopped_while_it_is_unpacked(folder: Path) -> None:
    fault = refusal(packed({"adapter_model.safetensors": bytes(200_000_000)}), folder, 1_000_000_000)
    assert (fault.status, fault.code) == (413, "archive_too_large")
    assert sum(map(len, found(folder).values())) < 50_000_000


def test_a_bomb_that_claims_to_be_small_is_refused(folder: Path) -> None:
    data = bytearray(packed({"x.safetensors": bytes(5_000_000)}))
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", 10)
    fault = refusal(bytes(data), folder)
    assert (fault.status, fault.code) == (400, "archive_unreadable")
    assert sum(map(len, found(folder).values())) <= 10


def test_all_files_together_count(folder: Path) -> None:
    data = packed({f"{i}.json": bytes(range(256)) * 4 for i in range(10)})
    unpack(data, folder, 10_240)
    for path in folder.iterdir():
        path.unlink()
    fault = refusal(data, folder, 10_239)
    assert (fault.status, fault.code) == (413, "archive_too_large")
    assert "0.010239 MB" in fault.message


def test_too_many_files_are_refused(folder: Path) -> None:
    assert refusal(packed({f"{i}.json": b"" for i in range(65)}), folder).code == "archive_too_large"
    fault = refusal(packed({f"{i}.json": b"" for i in range(20_000)}), folder)
    assert (fault.status, fault.code) == (400, "archive_unreadable")
    assert not found(folder)


@pytest.mark.parametrize(
    "data",
    [b"", b"PK", b"\x00" * 100, packed(ADAPTER)[:-30], packed(ADAPTER)[500:], b"RIFF0000WAVE"],
    ids=["empty", "two letters", "zeros", "end missing", "beginning missing", "sound"],
)
def test_what_is_no_archive_is_said_to_be_none(folder: Path, data: bytes) -> None:
    fault = refusal(data, folder)
    assert (fault.status, fault.code) == (400, "archive_unreadable")


def test_an_archive_without_files_is_refused(folder: Path) -> None:
    assert refusal(packed({}), folder).code == "archive_refused"
    assert refusal(packed({"anna/": b""}), folder).code == "archive_refused"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=6)), min_size=1, max_size=5))
def test_a_damaged_archive_is_unpacked_or_refused(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[float, bytes]]
) -> None:
    folder = tmp_path_factory.mktemp("outer") / "inner"
    folder.mkdir()
    data = bytearray(packed({"anna/adapter_config.json": b'{"r": 8}', "anna/merges.txt": b"a b\n" * 50}))
    for place, content in changes:
        start = int(place * len(data))
        data[start : start + len(content)] = content
    try:
        unpack(bytes(data), folder, 10_000)
    except ServiceError as fault:
        assert fault.status in (400, 413, 422)
    assert list(folder.parent.iterdir()) == [folder]
    assert sum(map(len, found(folder).values())) <= 10_000
