"""Audio of every common kind comes out as float32 mono at 16 kHz, and bad files give an error that says what is wrong."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from resonance.data.audio import Samples, iter_blocks, probe, read_audio, write_wav
from resonance.errors import AudioError, DataError, NoSoundError, TooLongError

SHARED = Path(os.environ.get("RESONANCE_SHARED") or Path(__file__).resolve().parents[2] / "../shared") / "data"


@pytest.fixture
def long_audio() -> Path:
    folder = SHARED / "long_audio"
    if not folder.is_dir():
        pytest.skip("no folder of real recordings beside the repository")
    return folder


def sweep(seconds: float, rate: int = 16_000) -> Samples:
    """A tone that rises and falls, so that every moment sounds different from its neighbours."""
    time = np.arange(round(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * (300 * time + 60 * np.sin(2 * time)))).astype(np.float32)


def encode(path: Path, audio: Samples, rate: int, codec: str, container: str | None = None) -> Path:
    """Write with FFmpeg, which names no type by the file's ending when `container` is given."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(audio[None], format="flt", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(stream.codec_context.format, "mono", rate)
        fifo = av.AudioFifo()
        for part in resampler.resample(frame) + resampler.resample(None):
            fifo.write(part)
        while part := fifo.read(stream.codec_context.frame_size or 1024) or fifo.read():
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return path


def video(path: Path, *, with_sound: bool) -> Path:
    with av.open(str(path), "w") as output:
        picture = output.add_stream("mpeg4", rate=10)
        picture.width = picture.height = 32
        picture.pix_fmt = "yuv420p"
        sound = output.add_stream("aac", rate=16_000, layout="mono") if with_sound else None
        for _ in range(10):
            output.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        output.mux(picture.encode(None))
        if sound:
            for start in range(0, 16_000, 1024):
                frame = av.AudioFrame.from_ndarray(sweep(1)[None, start : start + 1024], format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16_000, start
                output.mux(sound.encode(frame))
            output.mux(sound.encode(None))
    return path


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def error_of(path: Path, *span: float) -> str:
    with pytest.raises(AudioError) as caught:
        read_audio(path, *span)
    assert str(path) in str(caught.value)
    return str(caught.value)


FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "24bit.wav": ("WAV", "PCM_24"),
    "float.wav": ("WAV", "FLOAT"),
    "ulaw.wav": ("WAV", "ULAW"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_16"),
    "m4a": ("aac", None),
    "webm": ("libopus", None),
    "adts.aac": ("aac", "adts"),
    "mkv": ("aac", None),
    "avi": ("pcm_s16le", None),
}


def make(folder: Path, ending: str, audio: Samples, rate: int) -> Path:
    # The name says nothing about the content: files are recognised by what is in them.
    path = folder / f"我想 'x' 😀.{ending}"
    kind, subtype = FORMATS[ending]
    if kind.isupper():
        soundfile.write(path, audio, rate, format=kind, subtype=subtype)
    else:
        encode(path, audio, rate, kind, subtype)
    return path.rename(path.with_name(f"{path.stem}.{ending}.dat"))


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_and_a_span_of_it_at_the_right_time_whatever_the_file_is_called(
    tmp_path: Path, ending: str
) -> None:
    original = sweep(4)
    rate = 48_000
    path = make(tmp_path, ending, soxr.resample(original, 16_000, rate), rate)
    whole = read_audio(path)
    assert whole.dtype == np.float32
    assert probe(path).duration == pytest.approx(4, abs=0.1)
    assert len(whole) / 16_000 == pytest.approx(probe(path).duration, abs=0.05)
    # Encoders may delay the sound by some milliseconds: the best match within 100 ms is close.
    delay = int(np.argmax(np.correlate(whole[:48_000], original[1600:40_000], "valid"))) - 1600
    assert 0 <= delay <= 1600
    error = whole[delay : delay + 60_000] - original[:60_000]
    assert np.sqrt((error**2).mean()) < 0.02

    span = read_audio(path, 1.5, 2.5)
    assert len(span) == 16_000
    millisecond = 16 if ending in ("mkv", "webm") else 0  # their time marks are whole milliseconds
    errors = [
        np.abs(span - whole[i : i + 16_000])[800:-800].max() for i in range(24_000 - millisecond, 24_001 + millisecond)
    ]
    assert min(errors) < 0.02


def test_values_of_16_bit_files_are_exact_and_writing_brings_them_back(tmp_path: Path) -> None:
    values = np.array([-32768, -1, 0, 1, 12345, 32767], dtype=np.int16)
    soundfile.write(tmp_path / "a.flac", values, 16_000)
    audio = read_audio(tmp_path / "a.flac")
    assert (audio == values / 32768).all()
    write_wav(tmp_path / "new folder" / "b.wav", audio)
    written, rate = soundfile.read(tmp_path / "new folder" / "b.wav", dtype="int16")
    assert rate == 16_000
    assert (written == values).all()
    write_wav(tmp_path / "c.wav", np.array([2.0, -2.0], np.float32))
    assert read_audio(tmp_path / "c.wav").tolist() == [32767 / 32768, -1.0]


def test_eight_channels_at_192_khz_are_averaged_and_resampled(tmp_path: Path) -> None:
    mono = soxr.resample(sweep(2), 16_000, 192_000)
    channels = mono[:, None] * np.linspace(0, 2, 8, dtype=np.float32)  # their mean is `mono`
    soundfile.write(tmp_path / "a.wav", channels, 192_000, subtype="FLOAT")
    audio = read_audio(tmp_path / "a.wav")
    assert len(audio) == 32_000
    assert np.abs(audio - soxr.resample(mono, 192_000, 16_000)).max() < 1e-5


def test_blocks_of_a_long_file_are_the_whole_in_little_memory(tmp_path: Path) -> None:
    audio = np.tile(sweep(10, 44_100), 18)
    soundfile.write(tmp_path / "long.wav", np.stack([audio, audio], 1), 44_100)  # 3 minutes: 63 MB as float32
    tracemalloc.start()
    length = sum(len(block) for block in iter_blocks(tmp_path / "long.wav"))
    peak = tracemalloc.get_traced_memory()[1]
    read_audio(tmp_path / "long.wav", 100, 101)
    tracemalloc.stop()
    assert length == 180 * 16_000
    assert peak < 6e6
    blocks = np.concatenate(list(iter_blocks(tmp_path / "long.wav", 10, 70)))
    assert np.array_equal(blocks, read_audio(tmp_path / "long.wav", 10, 70))
    assert len(blocks) == 60 * 16_000


def test_decoding_stops_at_the_limit_before_a_long_recording_fills_the_memory(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.flac", np.zeros(16_000 * 600, np.int16), 16_000)
    soundfile.write(tmp_path / "exact.wav", sweep(30, 44_100), 44_100)
    encode(tmp_path / "a.aac", sweep(12), 16_000, "aac", "adts")
    tracemalloc.start()
    with pytest.raises(AudioError, match=r"silence\.flac: longer than the 30 seconds"):
        read_audio(tmp_path / "silence.flac", max_seconds=30)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    with pytest.raises(AudioError, match="longer than the 11 seconds"):  # the length is not in the header
        read_audio(tmp_path / "a.aac", max_seconds=11)
    assert len(read_audio(tmp_path / "exact.wav", max_seconds=30)) == 480_000


@pytest.mark.parametrize("ending", ["wav", "flac", "mp3", "mkv", "webm"])
def test_a_file_that_was_cut_off_says_how_much_of_it_is_there(tmp_path: Path, ending: str) -> None:
    path = make(tmp_path, ending, sweep(5, 48_000), 48_000)
    message = error_of(cut(path))
    readable = float(message.split("only ")[1].split(" of 5.0")[0])
    assert 2 < readable < 4
    if ending in ("wav", "flac"):
        assert len(read_audio(path, 0.5, 2)) == 24_000  # a span before the cut is fine


@pytest.mark.parametrize("ending", ["ogg", "opus", "m4a"])
def test_a_file_that_was_cut_off_without_a_stated_length_is_refused_too(tmp_path: Path, ending: str) -> None:
    assert "its end is missing" in error_of(cut(make(tmp_path, ending, sweep(5, 48_000), 48_000)))


@pytest.mark.parametrize("announced", [0, 0x7FFF_F000, 0xFFFF_FFFF, 96_000 + 44])
def test_wav_lengths_that_recorders_could_not_know_are_no_fault(tmp_path: Path, announced: int) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, sweep(3), 16_000)
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", announced)
    path.write_bytes(data)
    assert len(read_audio(path)) == 48_000
    assert probe(path).duration == 3


def test_flac_without_a_length_and_with_a_forged_one(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    soundfile.write(path, sweep(20), 16_000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)
    assert len(read_audio(path)) == 320_000
    data[21] |= 0x0F
    data[22:26] = b"\xff" * 4  # 50 days
    path.write_bytes(data)
    tracemalloc.start()
    assert "cut off or damaged: only " in error_of(path)
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_a_forged_sample_rate_is_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sweep(1), 1)
    assert "1 samples per second" in error_of(tmp_path / "a.wav")


def test_mp3_length_is_counted_where_the_header_does_not_state_it(tmp_path: Path) -> None:
    audio = np.concatenate([np.zeros(20 * 16_000, np.float32), sweep(5)])
    path = tmp_path / "a.mp3"
    with soundfile.SoundFile(path, "w", 16_000, 1, format="MP3", bitrate_mode="VARIABLE") as file:
        file.write(audio)
    data = path.read_bytes()
    without_tag = data[data.find(data[:2], 100) :]
    path.write_bytes(without_tag)
    assert probe(path).duration == pytest.approx(25, abs=0.1)
    assert len(read_audio(path)) == pytest.approx(25 * 16_000, abs=1600)
    with_cover = b"ID3\x04\0\0" + bytes([0, 0, 0x40, 0]) + bytes(8192) + data  # the stated length is behind a tag
    path.write_bytes(with_cover)
    assert probe(path).duration == 25


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_samples_that_are_not_numbers_are_refused_with_their_place(tmp_path: Path, bad: float, rate: int) -> None:
    audio = sweep(40, rate)
    audio[30 * rate] = bad
    soundfile.write(tmp_path / "a.wav", audio, rate, subtype="FLOAT")
    assert "not numbers" in error_of(tmp_path / "a.wav")
    assert len(read_audio(tmp_path / "a.wav", 0, 29)) == 29 * 16_000
    with pytest.raises(AudioError, match="not numbers"):
        write_wav(tmp_path / "b.wav", np.array([0, bad], np.float32))
    assert not (tmp_path / "b.wav").exists()


def test_samples_beyond_any_sound_are_refused_and_those_of_a_loud_recording_are_not(tmp_path: Path) -> None:
    audio = sweep(1, 16_000)
    audio[8000] = 3.0
    soundfile.write(tmp_path / "a.wav", audio, 16_000, subtype="FLOAT")
    assert read_audio(tmp_path / "a.wav").max() == 3.0
    audio[8000] = -1e30
    soundfile.write(tmp_path / "a.wav", audio, 16_000, subtype="FLOAT")
    assert "samples of 1.0e+30; sound is from -1 to 1" in error_of(tmp_path / "a.wav")


def test_sound_of_a_video_and_a_video_without_sound(tmp_path: Path) -> None:
    assert len(read_audio(video(tmp_path / "talk.mp4", with_sound=True))) == pytest.approx(16_000, abs=1100)
    assert "no audio track" in error_of(video(tmp_path / "mute.mp4", with_sound=False))


def test_what_is_no_audio_file_is_said_in_plain_words(tmp_path: Path) -> None:
    text = tmp_path / "a.wav"
    text.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\n")
    assert "text file, not audio. It begins with “version https://git-lfs" in error_of(text)
    # FFmpeg takes a list of recordings for subtitles without sound.
    text.write_text(json.dumps([{"audio": "audio/a.flac", "text": "stick"}, {"audio": "audio/b.flac", "text": "tear"}]))
    assert "text file, not audio. It begins with “[{" in error_of(text)
    text.write_bytes(b"")
    assert "empty (0 bytes)" in error_of(text)
    assert "this is a folder" in error_of(tmp_path)
    assert "no such file" in error_of(tmp_path / "none.wav")
    text.write_bytes(bytes(range(256)) * 40)
    assert "no sound that can be decoded" in error_of(text)
    soundfile.write(text, np.zeros(0, np.float32), 16_000)
    error_of(text)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.wav")
        assert "not a file" in error_of(tmp_path / "pipe.wav")


def test_a_file_that_may_not_be_read_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, sweep(1), 16_000)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)  # tests may run as root, whom no file mode stops
    assert "no permission" in error_of(path)


@pytest.mark.parametrize("span", [(5.0, 6.0), (2.0, 9.0), (2.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0)])
@pytest.mark.parametrize("ending", ["flac", "adts.aac"])
def test_a_span_outside_the_recording_is_refused(tmp_path: Path, ending: str, span: tuple[float, float]) -> None:
    path = make(tmp_path, ending, sweep(3), 16_000)
    assert "are not in this recording" in error_of(path, *span)


def test_a_span_that_ends_a_rounding_after_the_recording_is_its_end(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", sweep(3), 16_000)
    assert len(read_audio(tmp_path / "a.wav", 2, 3.1)) == 16_000


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text here")
def test_a_name_that_is_not_utf8_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode("你好.wav".encode("gbk"))
    write_wav(path, sweep(1))
    assert len(read_audio(path)) == 16_000


def test_damaged_mp3_prints_nothing_and_a_playlist_opens_nothing(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.mp3", sweep(5), 16_000)
    cut(tmp_path / "a.mp3")
    encode(tmp_path / "secret.aac", sweep(1), 16_000, "aac", "adts")
    (tmp_path / "list.m3u8").write_text(
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.aac\n#EXT-X-ENDLIST\n", encoding="utf-8"
    )
    program = (
        "import sys\nfrom resonance.data.audio import read_audio\nfrom resonance.errors import AudioError\n"
        "for name in sys.argv[1:]:\n  try: print(len(read_audio(name)))\n  except AudioError: print('refused')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "a.mp3", "list.m3u8"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("refused\nrefused\n", "")


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wav(tmp_path / "a.wav", sweep(1))
    before = (tmp_path / "a.wav").read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"a\.wav: cannot be written \(No space left on device\)"):
        write_wav(tmp_path / "a.wav", sweep(2))
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]
    assert (tmp_path / "a.wav").read_bytes() == before


@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_probing_takes_a_fraction_of_a_millisecond(tmp_path: Path, ending: str) -> None:
    path = make(tmp_path, ending, sweep(3), 16_000)
    best = float("inf")
    for _ in range(30):
        begin = time.perf_counter()
        probe(path)
        best = min(best, time.perf_counter() - begin)
    assert best < 0.001  # measured: 0.1 ms; the rest is for a busy machine


def test_real_recordings_have_the_length_their_list_says(long_audio: Path) -> None:
    rows = json.loads((long_audio / "labels.json").read_text(encoding="utf-8"))
    for row in rows:
        audio = read_audio(long_audio / row["audio"])
        assert 25 < len(audio) / 16_000 < 54
        assert probe(long_audio / row["audio"]).duration == pytest.approx(len(audio) / 16_000, abs=0.001)
        assert 0.01 < np.sqrt((audio**2).mean()) < 0.5
        span = read_audio(long_audio / row["audio"], 10, 12)
        assert np.abs(span - audio[160_000:192_000])[200:-200].max() < 1e-3


def test_blocks_of_a_file_in_memory_end_at_the_limit_with_an_error_of_their_own(tmp_path: Path) -> None:
    flac = tmp_path / "a.flac"
    soundfile.write(flac, sweep(3), 16_000)
    data = flac.read_bytes()
    np.testing.assert_array_equal(
        np.concatenate(list(iter_blocks("sent.flac", data=data, max_seconds=3))), read_audio(flac)
    )
    with pytest.raises(TooLongError, match=r"sent\.flac: longer than the 2 seconds"):
        next(iter_blocks("sent.flac", data=data, max_seconds=2))  # by its header: nothing is decoded


def test_a_recording_without_a_stated_length_is_decoded_up_to_the_limit_and_no_further(tmp_path: Path) -> None:
    mp3 = encode(tmp_path / "a.mp3", sweep(60), 16_000, "libmp3lame")
    bare = mp3.read_bytes().replace(b"Info", bytes(4), 1)
    produced = 0
    with pytest.raises(TooLongError):
        for block in iter_blocks("sent.mp3", data=bare, max_seconds=20):
            produced += len(block)
    assert produced <= 20 * 16_000


def test_no_sound_is_an_error_of_its_own(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), 16_000)
    for data in (b"", (tmp_path / "a.wav").read_bytes()):
        with pytest.raises(NoSoundError):
            read_audio("sent.wav", data=data)
