"""Tar shards: written completely or gone on with, read in any process, broken ones named."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

sys.path.insert(0, str(Path(__file__).parent))
import streamed

from resonance.cli import run
from resonance.data.audio import read_audio
from resonance.data.samples import Sample, Source
from resonance.data.sources import looks_streamed, open_source
from resonance.errors import DataError, ManifestError, ShardError


def samples(source: Source) -> Iterator[Sample]:
    for unit, (_name, rows) in enumerate(source.units):
        yield from source.read(unit, range(sys.maxsize if rows is None else rows))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def shards(recordings: Callable[..., Path], tmp_path: Path) -> Path:
    """Twelve recordings in tar files of five, five and two."""
    out = tmp_path / "shards"
    assert (
        run(["data", "shard", "--train_file", str(recordings(12)), "--output_dir", str(out), "--clips_per_shard=5"])
        == 0
    )
    return out


def test_shards_hold_every_recording_as_it_is_and_an_index(shards: Path, tmp_path: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [5, 5, 2] and index["samples"] == 12
    assert not (shards / "shards.part.jsonl").exists()
    rows = json.loads((tmp_path / "recordings" / "labels.json").read_text())
    wanted = {row["text"]: (tmp_path / "recordings" / row["audio"]).read_bytes() for row in rows}
    source = open_source(shards)
    found = {sample.utterance.text: sample.data for sample in samples(source)}
    assert found == wanted
    assert source.seconds == pytest.approx(sum(s.utterance.duration or 0 for s in samples(source)), abs=0.01)


def test_what_the_list_says_stands_beside_each_recording(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "talk.wav", np.sin(np.arange(48_000) / 20) / 2, 16_000)
    rows = [
        {"audio": {"path": "talk.wav", "start_time": 1.0, "end_time": 2.5}, "sentence": "你好", "speaker": "anna", "language": "zh",
         "sentences": [{"start": 0.0, "end": 1.0, "text": "你好"}]},
        {"audio": {"path": "talk.wav"}, "sentence": "all of it"},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert (
        run(["data", "shard", "--train_file", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]) == 0
    )
    found = {sample.utterance.text: sample for sample in samples(open_source(tmp_path / "out"))}
    span = found["你好"].timed()
    assert (span.utterance.speaker, span.utterance.language) == ("anna", "zh")
    assert span.utterance.segments[0].text == "你好" and span.utterance.duration == 1.5
    assert span.utterance.audio.endswith(".flac") and span.utterance.start == 0.0
    np.testing.assert_allclose(span.audio(), read_audio(tmp_path / "talk.wav", 1.0, 2.5), atol=1 / 32768)
    assert found["all of it"].data == (tmp_path / "talk.wav").read_bytes()


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(
    recordings: Callable[..., Path], tmp_path: Path
) -> None:
    labels = recordings(300, (0.3, 0.4))
    command = ["data", "shard", "--train_file", str(labels), "--clips_per_shard=3"]
    assert run([*command, "--output_dir", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "resonance", *command, "--output_dir", str(out)])
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.tar"))) < 20 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = sorted(out.glob("*.tar"))
    assert len(done) >= 20 and not (out / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in done[:10]}
    (out / "clips-000099.tar.part").write_bytes(b"half")
    with (out / "shards.part.jsonl").open("a") as progress:
        progress.write('{"shard": {"na')  # a line torn by the kill

    assert run([*command, "--output_dir", str(out)]) == 0
    assert content(out) == content(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not written again


def test_a_shard_changed_between_the_runs_is_written_again(shards: Path, tmp_path: Path) -> None:
    whole = content(shards)
    part = tmp_path / "part"
    labels = tmp_path / "recordings" / "labels.json"
    process = ["data", "shard", "--train_file", str(labels), "--output_dir", str(part), "--clips_per_shard=5"]
    assert run(process) == 0
    index = json.loads((part / "index.json").read_text())
    settings = {
        "source": open_source(labels).fingerprint(),
        "max_bytes": 500 << 20,
        "max_clips": 5,
        "seed": 42,
        "skip_broken": False,
    }
    lines = [settings, *({"shard": s, "read": 5 * (i + 1), "left_out": []} for i, s in enumerate(index["shards"][:2]))]
    (part / "shards.part.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (part / "index.json").unlink()
    data = bytearray((part / "clips-000001.tar").read_bytes())
    data[700] ^= 1
    (part / "clips-000001.tar").write_bytes(data)
    assert run(process) == 0
    assert content(part) == whole


def test_other_recordings_or_a_full_folder_are_refused(
    shards: Path, recordings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(shards)
    assert run(["data", "shard", "--train_file", str(recordings(3, name="b")), "--output_dir", str(shards)]) == 1
    assert "not empty" in capsys.readouterr().err
    (shards / "shards.part.jsonl").write_text('{"source": "other"}\n')
    assert run(["data", "shard", "--train_file", str(tmp_path / "b"), "--output_dir", str(shards)]) == 1
    assert "begun with other recordings" in capsys.readouterr().err
    (shards / "shards.part.jsonl").unlink()
    assert content(shards) == before
    assert run(["data", "shard", "--train_file", "x", "--output_dir", str(tmp_path / "n"), "--shard_size=big"]) == 2
    assert "--shard_size is big. It must be a size" in capsys.readouterr().err


def test_an_unreadable_recording_stops_it_or_is_left_out_when_told_to(
    recordings: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = recordings(6)
    broken = sorted((labels.parent / "audio").iterdir())[2]
    broken.write_bytes(b"RIFF")
    command = ["data", "shard", "--train_file", str(labels), "--output_dir", str(tmp_path / "out")]
    assert run(command) == 1
    assert broken.name in capsys.readouterr().err and not (tmp_path / "out" / "index.json").exists()
    command[-1] = str(tmp_path / "without")
    assert run([*command, "--skip_broken"]) == 0
    assert f"Left out: {broken}" in capsys.readouterr().out
    assert len(list(samples(open_source(tmp_path / "without")))) == 5


def test_missing_and_cut_off_shards_are_all_named_and_skipped_only_when_told_to(shards: Path) -> None:
    before = open_source(shards)
    (shards / "clips-000000.tar").unlink()
    data = (shards / "clips-000001.tar").read_bytes()
    (shards / "clips-000001.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError) as error:
        open_source(shards)
    assert "clips-000000.tar is missing" in str(error.value) and "clips-000001.tar has" in str(error.value)
    told: list[str] = []
    source = open_source(shards, skip_broken=True, warn=told.append)
    assert "left out 2 shards: clips-000000.tar is missing; clips-000001.tar has" in told[0]
    # The others keep their place in the order, so a run may go on with it.
    assert source.units == before.units and source.fingerprint() == before.fingerprint()
    reader = streamed.reader(source, 0, 1, group=1, buffer=2)
    with pytest.raises(ShardError, match=r"clips-00000[01]\.tar"):
        streamed.heard(reader, 1)
    told.clear()
    reader.skip = told.append
    whole_ones = [text for epoch, text in streamed.heard(reader, 1) if epoch == 0]
    assert 2 <= len(whole_ones) < 8
    assert any("clips-000000.tar" in text for text in told) and any("clips-000001.tar" in text for text in told)


@pytest.mark.parametrize("damage", ("cut in a recording", "cut between samples", "header", "compressed"))
def test_damage_in_a_tar_without_an_index_is_an_error_and_not_an_early_end(tmp_path: Path, damage: str) -> None:
    path = streamed.write_tar(tmp_path / "a.tar", streamed.clips(0, 6))
    with tarfile.open(path) as archive:
        offsets = [member.offset for member in archive.getmembers()]
    data = bytearray(path.read_bytes())
    if damage == "cut in a recording":
        data = data[: offsets[6] + 600]
    elif damage == "cut between samples":
        data = data[: offsets[6]]
    elif damage == "header":
        data[offsets[6] + 5 : offsets[6] + 60] = os.urandom(55)
    else:
        import gzip

        data = bytearray(gzip.compress(bytes(data)))
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"a\.tar: damaged or cut off at byte"):
        open_source(path)


def test_tars_from_elsewhere_are_read_and_their_names_harm_nothing(tmp_path: Path) -> None:
    sound = streamed.wav()
    members = [
        ("../../outside.wav", sound), ("../../outside.txt", b"a path that leads out"),
        ("/etc/passwd.json", b'{"text": "an absolute one", "speaker": "x"}'), ("/etc/passwd.wav", sound),
        ("b/c.d.wav", sound), ("b/c.d.json", b'"only the text"'), ("b/c.png", b"a picture"),
        ("number.cls", b"7"), ("number.wav", sound),
        ("lonely.txt", b"no recording"),
    ]  # fmt: skip
    (tmp_path / "inside").mkdir()
    path = streamed.write_tar(tmp_path / "inside" / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("link.txt"), io.BytesIO())
    before = sorted(tmp_path.rglob("*"))
    found = list(samples(open_source(path)))
    assert [s.utterance.text for s in found if not s.fault] == [
        "a path that leads out", "an absolute one", "only the text", "7",
    ]  # fmt: skip
    faults = [s.fault for s in found if s.fault]
    assert [fault.partition(":")[0] for fault in faults] == [f"{path}/lonely", f"{path}/link"]
    assert all("no recording beside this text" in fault for fault in faults)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_index_that_names_files_elsewhere_is_refused(shards: Path) -> None:
    index = json.loads((shards / "index.json").read_text())
    index["shards"][0]["name"] = "../../secret.tar"
    (shards / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match="outside its own folder"):
        open_source(shards)
    (shards / "index.json").write_text('{"samples": 3}')
    with pytest.raises(ShardError, match="not an index"):
        open_source(shards)


def test_a_range_in_a_name_means_all_of_them(shards: Path) -> None:
    source = open_source(shards / "clips-{000000..000002}.tar")
    assert [unit.rows for unit in source.units] == [5, 5, 2]
    with pytest.raises(ShardError, match=r"clips-000003\.tar: not there"):
        open_source(shards / "clips-{000002..000003}.tar")


def test_sources_are_found_by_looking(shards: Path, recordings: Callable[..., Path], tmp_path: Path) -> None:
    assert looks_streamed(shards) and looks_streamed(shards / "index.json") and looks_streamed("s3://bucket/list.jsonl")
    assert looks_streamed(recordings(2, name="few")) is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="no list of recordings"):
        open_source(tmp_path / "empty")
    with pytest.raises(DataError):
        open_source(tmp_path / "nowhere")
