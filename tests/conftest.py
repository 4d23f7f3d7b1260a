"""A tiny random Whisper and made-up recordings; real ones where they lie beside the repository."""

from __future__ import annotations

import functools
import gc
import json
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

os.environ["RESONANCE_LANG"] = "en"
# Trainings of a random model with three clips are nothing for plans to learn from.
os.environ["RESONANCE_HOME"] = tempfile.mkdtemp(prefix="resonance-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may ask a model hub for anything
# Threads wait for each other after every operation. On a busy machine one of the tiny model's takes 9 ms with two, 0.02
# with one.
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).parent))  # of `forked`, also for its processes

gc.disable()  # until everything is imported

LONGEST = ("test_processes.py", "test_crash.py", "test_benchmarks.py", "test_nano.py", "test_transcribe_resume.py")
LANGUAGES = ("en", "zh", "de")


def leave_out_of_collections() -> None:
    """All objects there are. A search for garbage takes half a second with those of the libraries, and each training asks
    for two."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no process of several is left with one when the others are done."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_collection_finish() -> None:
    gc.enable()
    leave_out_of_collections()


def shared_folder() -> Path:
    given = os.environ.get("RESONANCE_SHARED")
    return Path(given) if given else Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real recordings and checkpoints; the test is skipped where there is none."""
    folder = shared_folder()
    if not (folder / "data").is_dir():
        pytest.skip(f"no real recordings here: {folder.name}/data beside the repository, or RESONANCE_SHARED")
    return folder


@pytest.fixture(scope="session")
def real_model(shared: Path) -> Path:
    folder = shared / "models" / "whisper-base-words"
    if not folder.is_dir():
        pytest.skip("no real checkpoint here: models/whisper-base-words")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a multilingual Whisper with random weights: 2+2 layers, 32 wide, bytes as tokens, 30 s window."""
    return build_tiny_whisper(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_model`, with other weights and 128 mel bins."""
    return build_tiny_whisper(tmp_path_factory.mktemp("model") / "other", seed=1, n_mels=128)


@pytest.fixture(scope="session")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_model`, 64 wide: bitsandbytes 0.50 packs 4-bit weights for processors with AVX512-BF16 by blocks of 64, and
    fails on narrower layers, which no published Whisper has."""
    return build_tiny_whisper(tmp_path_factory.mktemp("model") / "wide", width=64)


@pytest.fixture(scope="session")
def english_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `tiny_model`, English only: no language and task tokens in its prompts."""
    return build_tiny_whisper(tmp_path_factory.mktemp("model") / "tiny.en", multilingual=False)


def build_tiny_whisper(
    folder: Path, *, seed: int = 0, n_mels: int = 80, multilingual: bool = True, width: int = 32
) -> Path:
    """Write a random Whisper checkpoint with everything a real one has. Different seeds give different weights."""
    import torch
    from transformers import (
        AddedToken,
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    characters = list(bytes_to_unicode().values())
    vocabulary = {character: i for i, character in enumerate(characters)}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    specials = ["<|startoftranscript|>"]
    specials += [f"<|{code}|>" for code in LANGUAGES] if multilingual else []
    specials += [
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens(specials, special_tokens=True)
    # Not special, as in OpenAI's tokenizers: transformers treats them unlike all others.
    tokenizer.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False, special=False) for i in range(1501)])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ["<|endoftext|>", *specials]}

    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=n_mels,
        d_model=width,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * width,
        decoder_ffn_dim=2 * width,
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    model = WhisperForConditionalGeneration(config)
    settings = {
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "max_length": 448,
        "is_multilingual": multilingual,
        "return_timestamps": False,
    }
    if multilingual:
        settings |= {
            "lang_to_id": {f"<|{code}|>": ids[f"<|{code}|>"] for code in LANGUAGES},
            "task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        }
    model.generation_config = GenerationConfig(**settings)
    # A config-made model drops its language ids on reload otherwise.
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=n_mels).save_pretrained(folder)
    leave_out_of_collections()  # what has been imported since
    return folder


@pytest.fixture
def recordings(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a data folder: `recordings(count=12, seconds=(0.5, 1.5))` returns its labels.json."""

    def write(count: int = 12, seconds: tuple[float, float] = (0.4, 1.2), name: str = "recordings") -> Path:
        return write_recordings(tmp_path / name, count, seconds)

    return write


@pytest.fixture(scope="session")
def recordings_in() -> Callable[[Path, int], Path]:
    """A function that writes so many recordings of 0.4 to 1.2 s into a folder and returns its labels.json."""
    return lambda folder, count: write_recordings(folder, count, (0.4, 1.2))


def write_recordings(folder: Path, count: int, seconds: tuple[float, float]) -> Path:
    (folder / "audio").mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []
    for i in range(count):
        text = f"phrase {'abcdefghijklmnopqrstuvwxyz'[i % 26]}{i // 26}"
        samples = int(16_000 * random.uniform(*seconds))
        tone = 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * np.arange(samples) / 16_000)
        audio = f"audio/{i:03}_{text.replace(' ', '_')}.wav"
        soundfile.write(folder / audio, tone + 0.01 * random.standard_normal(samples), 16_000)
        rows.append({"audio": audio, "text": text})
    labels = folder / "labels.json"
    labels.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return labels


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model never ends its text: 54 tokens for a window of 30 s, not 448, make its tests eight times as fast."""
    from resonance.transcribe import decoding

    monkeypatch.setattr(decoding, "TOKENS_PER_SECOND", 1)


def train_command(model: Path, labels: Path, output_dir: Path, *flags: object) -> list[str]:
    """A short `resonance train`. Flags in `flags` win over those here."""
    return [
        *("train", "--model_name_or_path", str(model), "--train_file", str(labels), "--output_dir", str(output_dir)),
        *("--max_steps=4", "--eval_steps=2", "--logging_steps=1", "--validation_split=0.25", "--learning_rate=0.01"),
        *("--dataloader_num_workers=0", *map(str, flags)),
    ]


@pytest.fixture
def train(tiny_model: Path) -> Callable[..., int]:
    """A function that runs a short `resonance train` and returns its exit code: `train(labels, output_dir, *flags)`."""
    from resonance.cli import run

    return lambda labels, output_dir, *flags: run(train_command(tiny_model, labels, output_dir, *flags))


@pytest.fixture(scope="session")
def finished_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short `resonance train`: 9 recordings trained on, 3 held out. For reading only."""
    from resonance.cli import run

    folder = tmp_path_factory.mktemp("finished")
    labels = write_recordings(folder / "recordings", 12, (0.4, 1.2))
    assert run(train_command(tiny_model, labels, folder / "run")) == 0
    leave_out_of_collections()
    return folder / "run"


@pytest.fixture(scope="session")
def openai_shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a multilingual Whisper: 51,865 tokens in OpenAI's order, 2+2 layers, 64 wide. It says different things for
    different sounds, and one text is far more likely than the next, as with a real one."""
    return build_openai_shaped(tmp_path_factory.mktemp("model") / "random-whisper")


def build_openai_shaped(folder: Path, seed: int = 0) -> Path:
    import itertools

    import torch
    from transformers import (
        AddedToken,
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    characters = list(bytes_to_unicode().values())
    # 256 bytes and pairs of them, 50,256 in all; OpenAI's 50,257th is empty.
    pairs = list(itertools.islice(itertools.product(characters, characters), 50_000))
    vocabulary = {token: i for i, token in enumerate([*characters, *(a + b for a, b in pairs), "", "<|endoftext|>"])}
    specials = ["<|startoftranscript|>", *(f"<|{code}|>" for code in list(LANGUAGES)[:99])]
    specials += [
        "<|translate|>",
        "<|transcribe|>",
        "<|startoflm|>",
        "<|startofprev|>",
        "<|nospeech|>",
        "<|notimestamps|>",
    ]
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=pairs)
    tokenizer.add_tokens(specials, special_tokens=True)
    tokenizer.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False, special=False) for i in range(1501)])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ["<|endoftext|>", *specials]}
    assert len(tokenizer) == 51_865

    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=51_865,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        init_std=0.3,
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
        no_timestamps_token_id=ids["<|notimestamps|>"],
        prev_sot_token_id=ids["<|startofprev|>"],
        max_initial_timestamp_index=50,
        max_length=448,
        is_multilingual=True,
        return_timestamps=False,
        lang_to_id={f"<|{code}|>": ids[f"<|{code}|>"] for code in list(LANGUAGES)[:99]},
        task_to_id={"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        alignment_heads=[[1, 0], [1, 1]],
        suppress_tokens=[5, 6, 7, *range(50_258, 50_364)],
        begin_suppress_tokens=[220, 50_257],
    )
    model.generation_config._from_model_config = False  # the language ids are dropped on reload otherwise
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tuned_run(openai_shaped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like `finished_run`, with an adapter for `openai_shaped`. For reading only."""
    from resonance.cli import run

    folder = tmp_path_factory.mktemp("tuned")
    labels = write_recordings(folder / "recordings", 8, (0.4, 1.2))
    flags = ("--language=en", "--context_alignment_steps=0", "--target_modules=all-linear", "--eval_strategy=no")
    assert run(train_command(openai_shaped, labels, folder / "run", *flags)) == 0
    leave_out_of_collections()
    return folder / "run"


@pytest.fixture(scope="session")
def aws_descriptions() -> Iterator[None]:
    """Whoever talks to AWS reads a megabyte or more of JSON that describes its services, here each file only once."""
    loaders = pytest.importorskip("botocore.loaders")
    read = functools.cache(loaders.JSONFileLoader().load_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders.JSONFileLoader, "load_file", lambda self, path: read(path))
        yield


@pytest.fixture
def s3(aws_descriptions: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The address of a server that speaks S3, with the bucket “voices”."""
    s3fs = pytest.importorskip("s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # an older one would ask the server of another test
    moto = pytest.importorskip("moto.server")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    urllib.request.urlopen(
        f"http://{host}:{port}/moto-api/reset", data=b""
    ).close()  # all servers keep the same objects
    boto3.client("s3").create_bucket(Bucket="voices")
    yield "s3://voices"
    server.stop()
