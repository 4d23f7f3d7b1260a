"""Files for whisper.cpp, read here by its published layout with nothing of the writer's."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resonance.errors import ExportError
from resonance.export import ggml
from resonance.model.load import Whisper, load_whisper

TYPES = {0: 4, 1: 2}  # ggml's numbers for float32 and float16, and the bytes of a value


class Parsed:
    """A file as `whisper_model_load` in whisper.cpp reads it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        assert self.ints(1) == [0x67676D6C]
        names = "n_vocab n_audio_ctx n_audio_state n_audio_head n_audio_layer n_text_ctx n_text_state n_text_head"
        self.head = dict(zip([*names.split(), "n_text_layer", "n_mels", "ftype"], self.ints(11), strict=True))
        mels, frequencies = self.ints(2)
        self.filters = np.frombuffer(self.take(4 * mels * frequencies), "<f4").reshape(mels, frequencies)
        self.tokens = [self.take(self.ints(1)[0]) for _token in range(self.ints(1)[0])]
        self.tensors: dict[str, tuple[int, np.ndarray]] = {}
        while self.at < len(data):
            dimensions, length, kind = self.ints(3)
            sizes = self.ints(dimensions)
            name = self.take(length).decode()
            values = int(np.prod(sizes))
            if kind == 8:  # blocks of 32: a scale in float16 and 32 times int8
                found = []
                for _block in range(values // 32):
                    (scale,) = struct.unpack("<e", self.take(2))
                    found += [scale * value for value in struct.unpack("<32b", self.take(32))]
                array = np.array(found, dtype=np.float32)
            else:
                array = np.frombuffer(self.take(TYPES[kind] * values), "<f4" if kind == 0 else "<f2").astype(np.float32)
            self.tensors[name] = (kind, array.reshape(sizes[::-1]))

    def take(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        assert len(part) == count
        self.at += count
        return part

    def ints(self, count: int) -> list[int]:
        return list(struct.unpack(f"<{count}i", self.take(4 * count)))


@pytest.fixture(scope="module")
def whisper(openai_shaped: Path) -> Whisper:
    return load_whisper(str(openai_shaped), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def written(whisper: Whisper, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("ggml")

    def write(quantization: str) -> Path:
        file = folder / f"{quantization}.bin"
        if not file.exists():
            ggml.write_ggml(file, whisper, quantization)
        return file

    return write


def openai_names(whisper: Whisper) -> dict[str, torch.Tensor]:
    """Weights under the names of openai/whisper's model.py."""
    renamed = {}
    for name, tensor in whisper.model.state_dict().items():
        if name == "proj_out.weight":
            continue
        name = (
            name.removeprefix("model.")
            .replace(".layers.", ".blocks.")
            .replace("embed_positions.weight", "positional_embedding")
        )
        for old, new in [
            ("self_attn_layer_norm", "attn_ln"),
            ("encoder_attn_layer_norm", "cross_attn_ln"),
            ("final_layer_norm", "mlp_ln"),
            ("self_attn", "attn"),
            ("encoder_attn", "cross_attn"),
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("out_proj", "out"),
            ("fc1", "mlp.0"),
            ("fc2", "mlp.2"),
            ("embed_tokens", "token_embedding"),
            ("encoder.layer_norm", "encoder.ln_post"),
            ("decoder.layer_norm", "decoder.ln"),
        ]:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize(("quantization", "ftype", "big"), [("f16", 1, 1), ("q8_0", 2007, 8)])
def test_every_weight_is_there_by_whisper_cpp_s_layout(
    quantization: str, ftype: int, big: int, whisper: Whisper, written: Callable[[str], Path]
) -> None:
    parsed = Parsed(written(quantization).read_bytes())
    assert parsed.head == {
        "n_vocab": 51_865,
        "n_audio_ctx": 1500,
        "n_audio_state": 64,
        "n_audio_head": 2,
        "n_audio_layer": 2,
        "n_text_ctx": 448,
        "n_text_state": 64,
        "n_text_head": 2,
        "n_text_layer": 2,
        "n_mels": 80,
        "ftype": ftype,
    }
    weights = openai_names(whisper)
    assert parsed.tensors.keys() == weights.keys()
    for name, (kind, found) in parsed.tensors.items():
        wanted = weights[name].float().numpy()
        if name in ("encoder.conv1.bias", "encoder.conv2.bias"):
            assert found.shape == (64, 1)
            found = found[:, 0]
        assert found.shape == wanted.shape, name
        small = wanted.ndim == 1 or name.endswith("positional_embedding")
        assert kind == (0 if small else 1 if wanted.ndim == 3 else big), name
        step = {0: 0.0, 1: 2**-11 * np.abs(wanted).max(), 8: 0.6 * np.abs(wanted).max() / 127}[kind]
        assert np.abs(found - wanted).max() <= step, name


def test_the_vocabulary_is_bytes_by_id_without_special_tokens(whisper: Whisper, written: Callable[[str], Path]) -> None:
    parsed = Parsed(written("f16").read_bytes())
    assert len(parsed.tokens) == 50_257  # whisper.cpp adds [_EOT_] and the others from there on
    assert parsed.tokens[-1] == b""
    text = " Rufe Schwester 护士 an"
    ids = whisper.tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(parsed.tokens[i] for i in ids).decode() == text


def test_the_mel_filters_are_those_of_the_model(whisper: Whisper, written: Callable[[str], Path]) -> None:
    parsed = Parsed(written("f16").read_bytes())
    assert parsed.filters.shape == (80, 201)
    assert np.allclose(parsed.filters, np.array(whisper.feature_extractor.mel_filters).T)


def test_a_damaged_file_is_refused(whisper: Whisper, written: Callable[[str], Path], tmp_path: Path) -> None:
    data = written("q8_0").read_bytes()
    for name, damaged in {
        "cut off": data[:-100],
        "no model": b"x" + data[1:],
        "lacks": data[: last_tensor(data)],
    }.items():
        (tmp_path / "damaged.bin").write_bytes(damaged)
        with pytest.raises(ExportError, match=name):
            ggml.load_tensors(tmp_path / "damaged.bin", whisper.model)


def last_tensor(data: bytes) -> int:
    """Where the header of the last tensor begins."""
    name = b"decoder.ln.bias"
    return data.rindex(name) - 4 * 4


def test_what_whisper_cpp_has_no_room_for_is_refused(whisper: Whisper, tiny_model: Path) -> None:
    with pytest.raises(ExportError, match="vocabulary has"):
        ggml.check_fits(load_whisper(str(tiny_model), device=torch.device("cpu")).model, True)
    with pytest.raises(ExportError, match="output layer"):
        ggml.check_fits(whisper.model, False)
    ggml.check_fits(whisper.model, True)


def test_whisper_cpp_runs_a_file_of_a_real_model(real_model: Path, tmp_path: Path) -> None:
    pywhispercpp: Any = pytest.importorskip("pywhispercpp.model", reason="whisper.cpp (pywhispercpp) is not installed")
    whisper = load_whisper(str(real_model), device=torch.device("cpu"))
    ggml.write_ggml(tmp_path / "model.bin", whisper, "f16")
    silence = np.zeros(16_000, dtype=np.float32)
    assert isinstance(pywhispercpp.Model(str(tmp_path / "model.bin")).transcribe(silence, language="en"), list)
