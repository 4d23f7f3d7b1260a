"""Manifests in every common format become the same records, and a faulty one says what to correct."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from resonance.data.formats import load_manifest, write_manifest
from resonance.data.manifest import Segment, Utterance
from resonance.errors import DataError, ManifestError

ROWS = [("audio/001_我想喝水.wav", "我想喝水"), ("audio/it's 😀.wav", 'he said "hi", twice')]


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def fault(path: Path, **options: object) -> str:
    with pytest.raises(ManifestError) as caught:
        load_manifest(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


FORMATS = {
    "JSON list": json.dumps([{"audio_path": a, "text": t} for a, t in ROWS], ensure_ascii=False, indent=1),
    "JSON map": json.dumps(dict(ROWS), ensure_ascii=False),
    "JSON lines": "".join(json.dumps({"audio": {"path": a}, "sentence": t}) + "\r\n" for a, t in ROWS),
    "CSV table": 'file_name,transcription\naudio/001_我想喝水.wav,我想喝水\n\naudio/it\'s 😀.wav,"he said ""hi"", twice"\n',
    "TSV table": 'client_id\tpath\tsentence\nx\taudio/001_我想喝水.wav\t我想喝水\nx\taudio/it\'s 😀.wav\the said "hi", twice\n',
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_each_format_is_recognised_by_its_content_alone(tmp_path: Path, name: str, bom: bytes) -> None:
    manifest = load_manifest(put(tmp_path / "list.txt", bom + FORMATS[name].encode()))
    assert manifest.format == name
    assert [(u.audio, u.text) for u in manifest.utterances] == [(str(tmp_path / a), t) for a, t in ROWS]


def test_row_numbers_are_lines_for_line_based_formats_even_with_line_breaks_in_a_text(tmp_path: Path) -> None:
    table = put(tmp_path / "a.csv", 'audio;text\na.wav;"one\ntwo"\nb.wav;three\n')
    assert [u.row for u in load_manifest(table).utterances] == [2, 4]


def test_times_and_sentences_of_json_lines_are_read(tmp_path: Path) -> None:
    row = {
        "audio": {"path": "a.wav", "start_time": 1, "end_time": 3.5},
        "sentence": " cafe\u0301 x ",
        "duration": 99,
        "language": "Chinese",
        "speaker": "p1",
        "sentences": [{"start": 0, "end": 1.5, "text": "café"}, {"start": 1.5, "end": 2.5, "text": "x"}],
    }
    path = put(tmp_path / "a.jsonl", json.dumps(row) + "\n")
    segments = (Segment(0, 1.5, "café"), Segment(1.5, 2.5, "x"))
    expected = Utterance(str(tmp_path / "a.wav"), "café x", 1, 1.0, 3.5, 2.5, "Chinese", "p1", segments)
    assert load_manifest(path).utterances == [expected]


def test_offset_and_duration_are_a_span(tmp_path: Path) -> None:
    path = put(tmp_path / "nemo", '{"audio_filepath": "/a.wav", "text": "x", "offset": 0, "duration": 2.5}')
    (row,) = load_manifest(path).utterances
    assert (row.audio, row.start, row.end, row.duration) == ("/a.wav", 0.0, 2.5, 2.5)


def test_paths_are_looked_up_beside_the_manifest_then_in_clips_then_in_the_dataset_folder(tmp_path: Path) -> None:
    names = ["lists/a.wav", "lists/clips/a.wav", "lists/clips/b.wav", "data/b.wav", "data/c/c.wav"]
    for name in names:
        put(tmp_path / name, b"")
    table = put(tmp_path / "lists/train.tsv", "path\tsentence\na.wav\tx\nb.wav\tx\nc\\c.wav\tx\nd.wav\tx\n")
    rows = load_manifest(table, dataset_dir=tmp_path / "data").utterances
    expected = ["lists/a.wav", "lists/clips/b.wav", "data/c/c.wav", "lists/d.wav"]
    assert [u.audio for u in rows] == [str(tmp_path / name) for name in expected]


def test_a_folder_with_json_file_reads_that_file(tmp_path: Path) -> None:
    put(tmp_path / "other.json", "[]")
    put(tmp_path / "map.json", '{"audio1.wav": "transcript"}')
    (row,) = load_manifest(tmp_path, json_file="map.json").utterances
    assert (row.audio, row.text) == (str(tmp_path / "audio1.wav"), "transcript")


def test_a_data_folder_with_several_lists_names_them_and_uses_none(tmp_path: Path) -> None:
    put(tmp_path / "labels.json", FORMATS["JSON list"])
    put(tmp_path / "notes.csv", "a,b\n")
    assert load_manifest(tmp_path).path == tmp_path / "labels.json"
    put(tmp_path / "train.tsv", FORMATS["TSV table"])
    assert "labels.json, train.tsv" in fault(tmp_path)


def test_kaldi_folders_with_and_without_segments(tmp_path: Path) -> None:
    put(tmp_path / "wav.scp", "r1 wav/a b.wav\n")
    put(tmp_path / "text", "r1  你好 world \n")
    put(tmp_path / "utt2spk", "r1 s1\n")
    audio = str(tmp_path / "wav/a b.wav")
    assert load_manifest(tmp_path).utterances == [Utterance(audio, "你好 world", 1, speaker="s1")]
    put(tmp_path / "text", "u1 one\nu2 two\n")
    put(tmp_path / "segments", "u1 r1 0.5 2\nu2 r1 2 -1\n")
    expected = [Utterance(audio, "one", 1, 0.5, 2.0, 1.5), Utterance(audio, "two", 2, 2.0)]
    assert load_manifest(tmp_path).utterances == expected


def test_kaldi_commands_are_refused_and_not_run(tmp_path: Path) -> None:
    put(tmp_path / "wav.scp", f"r1 touch {tmp_path}/ran |\nr2 feats.ark:17\n")
    put(tmp_path / "text", "r1 a\nr2 b\n")
    message = fault(tmp_path)
    assert "line 1" in message and "is a command" in message
    assert "line 2" in message and "archive" in message
    assert not (tmp_path / "ran").exists()


def test_a_file_listed_twice_in_a_json_map_is_not_dropped(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", '{"a.wav": "one", "b.wav": "two", "a.wav": "three"}')
    assert [u.text for u in load_manifest(path).utterances] == ["one", "two", "three"]


def test_quotes_of_common_voice_and_of_spreadsheets_in_tab_separated_tables(tmp_path: Path) -> None:
    path = put(tmp_path / "a.tsv", 'path\tsentence\na\t"Go" he said\nb\t"He said ""go"", twice"\nc\t"unclosed\n')
    assert [u.text for u in load_manifest(path).utterances] == ['"Go" he said', 'He said "go", twice', '"unclosed']


TEXT = '[{"audio": "a.wav", "text": "我想喝水，請幫我開燈"}, {"audio": "b.wav", "text": "今天天氣很好嗎"}]'


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (TEXT.replace("請幫我開燈", "").replace("氣很好嗎", "").encode("gb2312"), "GBK"),
        (TEXT.encode("gb18030"), "GB18030"),
        (TEXT.encode("big5"), "BIG5"),
        (TEXT.encode("utf-16"), "UTF-16"),
        ("path,text\na.wav,café réal naïve\n".encode("cp1252"), "CP1252"),
    ],
)
def test_another_encoding_is_named_with_a_command_that_repairs_it(tmp_path: Path, data: bytes, encoding: str) -> None:
    path = put(tmp_path / "my list.json", data)
    message = fault(path)
    assert f"iconv -f {encoding} -t UTF-8" in message
    subprocess.run(message[message.index("iconv") :], shell=True, check=True)
    assert len(load_manifest(tmp_path / "my list.utf8.json").utterances) > 0


def test_a_damaged_byte_in_utf8_is_located_and_not_taken_for_another_encoding(tmp_path: Path) -> None:
    text = json.dumps([{"audio": "a.wav", "text": "我想喝水"}] * 20, ensure_ascii=False, indent=0).encode()
    assert "line 80:" in fault(put(tmp_path / "a.json", text[:-12] + b"\xff" + text[-11:]))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("an audio file", b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00" + bytes(range(256)) * 9, "not a text file"),
        ("a workbook", b"PK\x03\x04" + bytes(50), "CSV UTF-8"),
        ("an empty file", b"", "no rows"),
        ("an empty list", b"[]", "no rows"),
        ("a header alone", b"audio,text\n", "no rows"),
        ("a missing comma", '[\n{"audio": "我.wav" "text": ""}]'.encode(), 'line 2, column 19: not valid JSON'),
        ("a comma too many", b'[{"audio": "a", "text": ""},\n]', "line 2, column 1: not valid JSON (take away the comma"),
        ("a list cut off", b'[{"audio": "a", "text": ""}', "line 1, column 28"),
        ("text behind the list", b'[{"audio": "a", "text": ""}] x', "Extra data"),
        ("a table without header", b"a.wav,hello\n", "The first line here has: a.wav, hello"),
        ("a quote never closed", b'audio,text\na.wav,x\nb.wav,"hi\nc.wav,y\n', "line 3: a text in quotes is not closed"),
        ("a comma in a text", b"audio,text\na.wav,well, yes\n", "line 2: 3 fields"),
        ("nested brackets", b"[" * 100_000, "too many brackets"),
    ],
)  # fmt: skip
def test_files_that_are_no_manifest_say_what_is_wrong(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    assert said in fault(put(tmp_path / "labels.json", content)), name


def test_all_faulty_rows_are_listed_at_once(tmp_path: Path) -> None:
    rows: list[object] = [
        {"audio": "a.wav", "text": "fine"},
        {"audio": "a.wav"},
        {"audio": 3, "text": ["x"]},
        "a.wav",
        {"audio": "a.wav", "text": "x", "start": 2, "end": "soon"},
        {"audio": "a.wav", "text": "x", "start": 2, "end": 1},
        {"audio": "s3://bucket/a.wav", "text": "x"},
        {"audio": "a.wav", "text": "\ud83d"},
    ]
    message = fault(put(tmp_path / "a.json", json.dumps(rows)))
    assert "row 1:" not in message
    for expected in ("row 2: no text", "row 3: the audio file must be", "found 3; the text must be", "row 4: expected",
                     "row 5: end must be a number", "row 6: it ends at", "row 7: s3://bucket/a.wav is an address",
                     "row 8: the text has half"):  # fmt: skip
        assert expected in message
    message = fault(put(tmp_path / "a.json", json.dumps([{"audio": "a.wav"}] * 100)))
    assert message.count("\n") == 21 and message.endswith("80 more")


def test_broken_lines_of_json_lines_are_all_listed(tmp_path: Path) -> None:
    message = fault(
        put(tmp_path / "a.jsonl", '{"audio": "a"\n{"audio": "a", "text": "x"}\n{"audio": "b",, "text": "x"}\n')
    )
    assert "line 1, column 14" in message and "line 3, column 15" in message


@pytest.mark.parametrize("name", ["new/train.json", "new/train.jsonl"])
def test_what_is_written_reads_back_equal_and_moves_with_its_folder(tmp_path: Path, name: str) -> None:
    inside = str(tmp_path / "new" / "audio" / "我.wav")
    segments = (Segment(0.0, 0.5, "a"),)
    rows = [
        Utterance(inside, 'line\nbreak "quoted" 😀', 1),
        Utterance("/elsewhere/b.wav", "b", 2, 1.5, 2.25, 0.75, "zh", "p1", segments),
        Utterance(str(tmp_path / "newer.wav"), "", 3, duration=2.0),
    ]
    write_manifest(tmp_path / name, rows)
    assert load_manifest(tmp_path / name).utterances == rows
    assert "我.wav" in (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / "new").rename(tmp_path / "moved")
    (moved, *_others) = load_manifest(tmp_path / "moved" / Path(name).name).utterances
    assert moved.audio == str(tmp_path / "moved" / "audio" / "我.wav")


def test_a_manifest_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = put(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_manifest(path, [Utterance("a.wav", "\ud800", 1)])
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
    with pytest.raises(DataError, match="cannot be written"):
        write_manifest(path / "b.json", [])


def test_a_dataset_with_embedded_audio_is_exported_and_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"audio": {"path": "x/我.wav", "bytes": b"RIFF1"}, "sentence": "one"},
            {"audio": {"path": None, "bytes": b"fLaC2"}, "sentence": "two"}]  # fmt: skip
    datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio()).save_to_disk(tmp_path / "saved")
    message = fault(tmp_path / "saved")
    command = message[message.index('-c "') + 4 : -1]
    subprocess.run([sys.executable, "-c", command], check=True, cwd=tmp_path)
    exported = load_manifest(tmp_path / "exported").utterances
    assert [(Path(u.audio).name, Path(u.audio).read_bytes(), u.text) for u in exported] == [
        ("000001_我.wav", b"RIFF1", "one"),
        ("000002_clip.flac", b"fLaC2", "two"),
    ]


def test_a_dataset_of_paths_is_read_and_one_of_several_parts_is_asked_about(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list([{"path": "a.wav", "text": "one", "speaker": 7}])
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "both")
    assert "test, train" in fault(tmp_path / "both")
    (row,) = load_manifest(tmp_path / "both" / "train", dataset_dir=tmp_path).utterances
    assert (row.audio, row.text, row.speaker) == (str(tmp_path / "both" / "train" / "a.wav"), "one", "7")


def test_100_000_rows_load_in_two_seconds_and_100_megabytes(tmp_path: Path) -> None:
    rows = [
        {"audio": f"audio/s{i % 50}/{i:06}.wav", "text": f"第 {i} 句话", "speaker": f"s{i % 50}"}
        for i in range(100_000)
    ]
    path = put(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False, indent=1))
    code = """
import sys, time
from pathlib import Path
import psutil
from resonance.data.formats import load_manifest
before, seconds = psutil.Process().memory_info().rss, []
for _ in range(3):  # the fastest: other work on the machine makes a run slower, never faster
    rows, start = None, time.process_time()
    rows = load_manifest(sys.argv[1]).utterances
    seconds.append(time.process_time() - start)
print(len(rows), min(seconds), (psutil.Process().memory_info().rss - before) / 1e6)
"""
    result = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    count, seconds, megabytes = map(float, result.stdout.split())
    assert count == 100_000 and seconds < 2 and megabytes < 100, result.stdout
