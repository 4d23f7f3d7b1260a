"""Lists, parquet files and datasets as sources; and all of it at addresses."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import streamed

from resonance.data import lists
from resonance.data.formats import load_manifest
from resonance.data.samples import Sample, Source
from resonance.data.sources import open_source
from resonance.errors import DataError, ManifestError, MissingExtraError, ShardError

ROWS = 257


def samples(source: Source) -> Iterator[Sample]:
    for unit, (_name, rows) in enumerate(source.units):
        yield from source.read(unit, range(sys.maxsize if rows is None else rows))


def told(source: Source) -> list[tuple[str, str, int]]:
    return [(s.utterance.audio, s.utterance.text, s.utterance.row) for s in samples(source)]


@pytest.fixture
def by_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are read by lines whatever their length."""
    monkeypatch.setattr(lists, "HELD_BYTES", 0)


LISTS = {
    "rows.jsonl": "\n".join(f'{{"audio": "a/{i}.wav", "text": "第 {i} 句", "duration": 1.5}}' for i in range(ROWS)),
    "blank.jsonl": "\ufeff" + "\r\n\n".join(f'{{"audio": "a/{i}.wav", "text": "x {i}"}}' for i in range(ROWS)) + "\n\n",
    "rows.tsv": "path\tsentence\n" + "\n".join(f'{i}.mp3\tshe said "no {i}' for i in range(ROWS)),
    "rows.csv": "file_name,transcription\n" + "\n".join(f'{i}.wav,"one, ""two""\nand {i}"' for i in range(ROWS)) + "\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_read_by_lines_is_the_list_read_whole(by_lines: None, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(LISTS[name], encoding="utf-8", newline="")
    source = open_source(path)
    assert isinstance(source, lists.LineList) and len(source.units) == 3
    rows = load_manifest(path).utterances
    assert told(source) == [(row.audio, row.text, row.row) for row in rows]
    assert sum(unit.rows or 0 for unit in source.units) == len(rows) == ROWS
    some = [s.utterance.text for s in source.read(1, range(3, 100, 40))]
    assert some == [row.text for row in rows[103:200:40]]


@pytest.mark.parametrize("name", ("rows.json", "map.json"))
def test_lists_without_lines_are_held(by_lines: None, tmp_path: Path, name: str) -> None:
    rows = {f"{i}.wav": f"text {i}" for i in range(ROWS)}
    values = rows if name == "map.json" else [{"audio": a, "text": t} for a, t in rows.items()]
    (tmp_path / name).write_text(json.dumps(values, indent=1))
    source = open_source(tmp_path / name)
    assert isinstance(source, lists.HeldList) and [s.utterance.text for s in samples(source)] == list(rows.values())


def test_rows_that_make_no_sense_are_named_with_their_lines(by_lines: None, tmp_path: Path) -> None:
    rows = LISTS["rows.jsonl"].splitlines()
    rows[150] = '{"audio": "a.wav"}'
    rows[151] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = list(samples(open_source(tmp_path / "a.jsonl")))
    (fault,) = [s.fault for s in found if s.fault]
    assert "a.jsonl: line 151: no text" in fault and "line 152, column" in fault
    assert len([s for s in found if not s.fault]) == ROWS - 2
    (tmp_path / "b.tsv").write_bytes("path\ttext\n1.wav\t你好\n".encode("gbk"))
    with pytest.raises(ManifestError, match="GBK"):
        open_source(tmp_path / "b.tsv")


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder as the hub keeps datasets: two files of the training part, one of another."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for name, first in (("train-0.parquet", 0), ("train-1.parquet", 30), ("test-0.parquet", 60)):
        rows = [
            {"audio": {"bytes": streamed.wav(), "path": f"{i}.wav"}, "sentence": f"row {i}"}
            for i in range(first, first + 30)
        ]
        datasets.Dataset.from_list(rows).to_parquet(folder / name, batch_size=12)
    return folder.parent


def test_parquet_files_give_their_row_groups(parquet: Path) -> None:
    source = open_source(parquet)
    assert [unit.rows for unit in source.units] == [12, 12, 6] * 2
    found = list(samples(source))
    assert [s.utterance.text for s in found] == [f"row {i}" for i in range(60)]
    assert found[7].data == streamed.wav() and found[7].timed().utterance.duration == pytest.approx(0.3)
    assert [s.utterance.text for s in source.read(3, range(1, 12, 5))] == ["row 31", "row 36", "row 41"]
    assert len(list(samples(open_source(parquet / "data" / "test-0.parquet")))) == 30


def test_a_damaged_parquet_file_is_named(parquet: Path) -> None:
    path = parquet / "data" / "train-1.parquet"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ShardError, match=r"train-1\.parquet: damaged"):
        open_source(parquet)


def test_saved_datasets_with_their_audio_inside_and_any_that_the_package_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"audio": {"bytes": streamed.wav(), "path": None}, "text": f"row {i}"} for i in range(130)]
    dataset = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
    dataset.save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert [unit.rows for unit in source.units] == [100, 30]
    assert [s.utterance.text for s in samples(source)] == [f"row {i}" for i in range(130)]

    from resonance.data.hub_dataset import HubDataset

    streaming = HubDataset("any/dataset", dataset.to_iterable_dataset(num_shards=3))
    assert [unit.rows for unit in streaming.units] == [None] * 3
    found = list(samples(streaming))
    assert sorted(s.utterance.text for s in found) == sorted(f"row {i}" for i in range(130))
    again = [s.utterance.text for s in streaming.read(1, range(5, 12, 3))]
    assert again == [s.utterance.text for s in found if s.unit == 1][5:12:3]


def test_a_dataset_that_is_not_on_the_hub_says_what_was_looked_for() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ShardError, match=r"nobody/nothing: no such file or folder here, and the dataset"):
        open_source("nobody/nothing")


@pytest.fixture
def elsewhere(recordings: Callable[..., Path], tmp_path: Path) -> Iterator[str]:
    """An address in fsspec's memory, with recordings, a list of them, shards and parquet files."""
    import fsspec

    from resonance.cli import run

    memory = fsspec.filesystem("memory")
    labels = recordings(9)
    command = [
        "data",
        "shard",
        "--train_file",
        str(labels),
        "--output_dir",
        str(tmp_path / "out"),
        "--clips_per_shard=4",
    ]
    assert run(command) == 0
    rows = json.loads(labels.read_text())
    for path in (tmp_path / "out").iterdir():
        memory.pipe(f"/data/shards/{path.name}", path.read_bytes())
        if path.name != "index.json":
            memory.pipe(f"/data/bare/{path.name}", path.read_bytes())
    for row in rows:
        memory.pipe(f"/data/{row['audio']}", (labels.parent / row["audio"]).read_bytes())
    memory.pipe("/data/list.jsonl", "\n".join(map(json.dumps, rows)).encode())
    memory.pipe("/data/list.json", json.dumps(rows).encode())
    yield "memory://data"
    memory.rm("/data", recursive=True)


@pytest.mark.parametrize(
    "name", ("shards", "shards/index.json", "bare", "bare/clips-{000000..000002}.tar", "list.jsonl")
)
def test_an_address_gives_what_the_files_here_give(elsewhere: str, tmp_path: Path, name: str) -> None:
    source = open_source(f"{elsewhere}/{name}")
    rows = json.loads((tmp_path / "recordings" / "labels.json").read_text())
    wanted = {row["text"]: (tmp_path / "recordings" / row["audio"]).read_bytes() for row in rows}
    assert {s.utterance.text: s.fetched().data for s in samples(source)} == wanted
    assert all((unit.rows is None) == name.startswith("bare") for unit in source.units)
    if "json" not in name.rpartition("/")[2]:
        here = open_source(tmp_path / "out")
        assert len(source.units) == len(here.units)


def test_a_list_there_that_is_not_by_lines_is_refused(elsewhere: str) -> None:
    with pytest.raises(ManifestError, match="must have one row a line"):
        open_source(f"{elsewhere}/list.json")


def test_what_is_not_there_is_named(elsewhere: str) -> None:
    for name in ("nothing", "nothing.tar", "nothing.parquet", "nothing.jsonl"):
        with pytest.raises(ShardError, match=rf"memory://data/{name}: "):
            list(samples(open_source(f"{elsewhere}/{name}")))
    with pytest.raises((MissingExtraError, ShardError), match="nowhere://x"):
        open_source("nowhere://x")
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.rm("/data/shards/clips-000001.tar")
    with pytest.raises(ShardError, match=r"clips-000001\.tar is missing"):
        open_source(f"{elsewhere}/shards")


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_s3_gives_shards_and_says_what_is_wrong(s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import boto3
    import s3fs

    data = streamed.write_tar(tmp_path / "a.tar", streamed.clips(0, 5)).read_bytes()
    boto3.client("s3").put_object(Bucket="voices", Key="train/a.tar", Body=data)
    source = open_source(f"{s3}/train")
    assert [s.utterance.text for s in samples(source)] == [f"clip {i}" for i in range(5)]
    for i in range(3):
        boto3.client("s3").put_object(Bucket="voices", Key=f"list/{i}.wav", Body=streamed.wav(0.2 + i / 10))
    rows = "".join(f'{{"audio": "{i}.wav", "text": "row {i}"}}\n' for i in range(3))
    boto3.client("s3").put_object(Bucket="voices", Key="list/rows.jsonl", Body=rows.encode())
    found = [s.timed() for s in samples(open_source(f"{s3}/list/rows.jsonl"))]
    assert [s.utterance.duration for s in found] == pytest.approx([0.2, 0.3, 0.4])
    assert [s.utterance.text for s in samples(open_source(f"{s3}/list/rows.jsonl")) if s.number > 0] == [
        "row 1",
        "row 2",
    ]
    with pytest.raises(ShardError, match=r"s3://absent/train: not there\. Check the spelling, .* bucket"):
        open_source("s3://absent/train")
    with pytest.raises(ShardError, match="s3://voices/trian"):
        open_source("s3://voices/trian")

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ShardError, match=r"s3://voices/train: access was refused .*AWS_PROFILE"):
        open_source(f"{s3}/train")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_list_of_addresses_needs_streaming(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"audio": "s3://bucket/a.wav", "text": "x"}]))
    with pytest.raises(DataError, match=r"row 1: s3://bucket/a\.wav is an address, not a file: add --streaming"):
        load_manifest(path)
    (only,) = samples(open_source(path))
    assert only.utterance.audio == "s3://bucket/a.wav"


def test_shards_given_without_streaming_say_what_is_missing(tmp_path: Path) -> None:
    streamed.write_tar(tmp_path / "a.tar", streamed.clips(0, 1))
    with pytest.raises(ManifestError, match="add --streaming"):
        load_manifest(tmp_path)


def test_sources_can_be_sent_to_workers_that_are_started_afresh(by_lines: None, parquet: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(LISTS["rows.jsonl"], encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps([{"audio": "a.wav", "text": "x"}]))
    streamed.write_tar(tmp_path / "a.tar", streamed.clips(0, 3))
    for name in ("rows.jsonl", "rows.json", "a.tar", "dataset"):
        source = open_source(tmp_path / name)
        again = pickle.loads(pickle.dumps(source))
        assert told(again) == told(source) and again.fingerprint() == source.fingerprint()
