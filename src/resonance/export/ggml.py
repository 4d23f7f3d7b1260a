"""Models in whisper.cpp's own file format, written and read.

Source of the layout: whisper.cpp `models/convert-h5-to-ggml.py`, the loader `whisper_model_load` in `src/whisper.cpp`, and
`examples/quantize`. All numbers are little-endian; int means int32.

    int 0x67676d6c; ints vocabulary, audio positions, width, heads and layers of the encoder, text positions, width, heads
    and layers of the decoder, mel bins, type of the file
    int mel bins, int frequencies; float32 [mel bins, frequencies] mel filters
    int tokens; each: int length, bytes. Special tokens are left out: whisper.cpp names them by their ids
    each tensor: int dimensions, int length of its name, int type; ints sizes, the last first; name; values

A tensor is float32 (type 0), float16 (1) or q8_0 (8): blocks of 32 values, each a float16 scale and 32 int8. whisper.cpp
wants biases, norms and positions in float32 and convolutions in float16, whatever the others are.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from resonance.errors import ExportError
from resonance.messages import _
from resonance.model.load import Whisper

MAGIC = 0x67676D6C
F32, F16, Q8_0 = 0, 1, 8
BLOCK = 32  # values that share a scale in q8_0
QUANTIZATION_VERSION = 2  # of ggml's blocks; counted in thousands in the type of the file
# Not float32: whisper.cpp 1.8 reads such files and stops at the first convolution (GGML_ASSERT in ops.cpp).
FILE_TYPES = {"f16": 1, "q8_0": 7 + 1000 * QUANTIZATION_VERSION}
BIG_TENSORS = {"f16": F16, "q8_0": Q8_0}
# whisper.cpp finds the special tokens by the size of the vocabulary: .en models, those up to v2, large-v3 and turbo.
VOCABULARIES = (51_864, 51_865, 51_866)
POSITIONS = ("encoder.positional_embedding", "decoder.positional_embedding")

_MODULES = {
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "self_attn_layer_norm": "attn_ln",
    "encoder_attn.q_proj": "cross_attn.query",
    "encoder_attn.k_proj": "cross_attn.key",
    "encoder_attn.v_proj": "cross_attn.value",
    "encoder_attn.out_proj": "cross_attn.out",
    "encoder_attn_layer_norm": "cross_attn_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
    "final_layer_norm": "mlp_ln",
}
_OUTSIDE = {
    "encoder.layer_norm": "encoder.ln_post",
    "decoder.layer_norm": "decoder.ln",
    "encoder.embed_positions.weight": "encoder.positional_embedding",
    "decoder.embed_positions.weight": "decoder.positional_embedding",
    "decoder.embed_tokens": "decoder.token_embedding",
}


@dataclass(frozen=True, slots=True)
class Header:
    """The eleven numbers at the head of a file, in their order."""

    vocabulary: int
    audio_positions: int
    audio_width: int
    audio_heads: int
    audio_layers: int
    text_positions: int
    text_width: int
    text_heads: int
    text_layers: int
    mels: int
    file_type: int

    @classmethod
    def of(cls, config: Any, quantization: str) -> Header:
        """From a WhisperConfig."""
        return cls(
            config.vocab_size,
            config.max_source_positions,
            config.d_model,
            config.encoder_attention_heads,
            config.encoder_layers,
            config.max_target_positions,
            config.d_model,
            config.decoder_attention_heads,
            config.decoder_layers,
            config.num_mel_bins,
            FILE_TYPES[quantization],
        )

    def numbers(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in self.__slots__)


def check_fits(model: Any, tied: bool) -> None:
    """Raise ExportError where whisper.cpp has no room for something in the model."""
    config = model.config
    if config.vocab_size not in VOCABULARIES:
        reason = _("its vocabulary has {count} tokens, and whisper.cpp knows only those of OpenAI's models").format(
            count=config.vocab_size
        )
    elif {config.encoder_ffn_dim, config.decoder_ffn_dim} != {4 * config.d_model}:
        reason = _("whisper.cpp takes the inner layers for four times as wide as the others, and they are not")
    elif not tied:
        reason = _("its output layer was trained apart from the token embedding, and whisper.cpp has one for both")
    else:
        return
    raise ExportError(_("This model cannot be written for whisper.cpp: {reason}.").format(reason=reason))


def write_ggml(file: Path, whisper: Whisper, quantization: str) -> None:
    """Write the model tensor by tensor; beside the model in memory there is never more than one."""
    model = whisper.model
    tokens = ordinary_tokens(whisper.tokenizer)
    filters = np.asarray(whisper.feature_extractor.mel_filters, dtype="<f4").T  # [mel bins, frequencies]
    with file.open("wb") as stream:
        stream.write(struct.pack("<i", MAGIC))
        stream.write(struct.pack("<11i", *Header.of(model.config, quantization).numbers()))
        stream.write(struct.pack("<2i", *filters.shape))
        stream.write(np.ascontiguousarray(filters).tobytes())
        stream.write(struct.pack("<i", len(tokens)))
        for token in tokens:
            stream.write(struct.pack("<i", len(token)) + token)
        for name, tensor in model.state_dict().items():
            if name != "proj_out.weight":  # the token embedding
                write_tensor(stream, ggml_name(name), tensor.detach().float().numpy(), quantization)


def write_tensor(stream: BinaryIO, name: str, values: np.ndarray, quantization: str) -> None:
    if name.endswith(("conv1.bias", "conv2.bias")):
        values = values[:, None]
    kind = tensor_type(name, values.shape, quantization)
    encoded = name.encode()
    stream.write(struct.pack("<3i", values.ndim, len(encoded), kind))
    stream.write(struct.pack(f"<{values.ndim}i", *reversed(values.shape)))
    stream.write(encoded)
    stream.write(pack(values, kind))


def tensor_type(name: str, shape: tuple[int, ...], quantization: str) -> int:
    """How the tensor of this name is written."""
    if len(shape) < 2 or name in POSITIONS or name.endswith("bias"):
        return F32
    return F16 if len(shape) > 2 else BIG_TENSORS[quantization]


def pack(values: np.ndarray, kind: int) -> bytes:
    """The bytes of a tensor. q8_0 rounds each block of 32 to 255 steps between minus and plus its largest value."""
    if kind == F32:
        return values.astype("<f4").tobytes()
    if kind == F16:
        return values.astype("<f2").tobytes()
    blocks = values.reshape(-1, BLOCK).astype(np.float32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    packed = np.empty(len(blocks), dtype=[("scale", "<f2"), ("values", "i1", BLOCK)])
    packed["scale"] = scale[:, 0]
    packed["values"] = np.rint(blocks * inverse)
    return packed.tobytes()


def unpack(data: bytes, shape: tuple[int, ...], kind: int) -> np.ndarray:
    """float32 values out of the bytes of a tensor."""
    if kind == Q8_0:
        blocks = np.frombuffer(data, dtype=[("scale", "<f2"), ("values", "i1", BLOCK)])
        flat: np.ndarray = blocks["scale"].astype(np.float32)[:, None] * blocks["values"]
        return flat.reshape(shape)
    return np.frombuffer(data, dtype="<f4" if kind == F32 else "<f2").astype(np.float32).reshape(shape)


def byte_count(shape: tuple[int, ...], kind: int) -> int:
    values = int(np.prod(shape, dtype=np.int64))
    return {F32: 4 * values, F16: 2 * values, Q8_0: values // BLOCK * (BLOCK + 2)}[kind]


def ggml_name(name: str) -> str:
    """OpenAI's name for one of transformers'."""
    part, *rest = name.removeprefix("model.").split(".")
    if rest[0] == "layers":
        module, leaf = ".".join(rest[2:-1]), rest[-1]
        return f"{part}.blocks.{rest[1]}.{_MODULES[module]}.{leaf}"
    full = ".".join([part, *rest])
    stem, _dot, leaf = full.rpartition(".")
    return _OUTSIDE.get(full) or f"{_OUTSIDE.get(stem, stem)}.{leaf}"


def ordinary_tokens(tokenizer: Any) -> list[bytes]:
    """The bytes of every token before `<|endoftext|>`, by id. One of OpenAI's vocabularies has an empty one."""
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    by_id = {i: token for token, i in vocabulary.items() if i < end}
    missing = [i for i in range(end) if i not in by_id]
    if missing and missing != [end - 1]:
        raise ExportError(
            _("The model's vocabulary has no token {id}, so it cannot be written for whisper.cpp.").format(
                id=missing[0]
            )
        )
    return [bytes(bytes_of[character] for character in by_id.get(i, "")) for i in range(end)]


def read_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """(name, float32 values) of every tensor of a file, one after the other. Raises ExportError where it is damaged."""
    with file.open("rb") as stream:

        def ints(count: int) -> tuple[int, ...]:
            return struct.unpack(f"<{count}i", exactly(4 * count))

        def exactly(count: int) -> bytes:
            data = stream.read(count)
            if len(data) < count:
                raise ExportError(_("{path} is cut off: export again.").format(path=file))
            return data

        if ints(1) != (MAGIC,):
            raise ExportError(_("{path} is no model for whisper.cpp.").format(path=file))
        ints(11)
        rows, columns = ints(2)
        exactly(4 * rows * columns)
        for _token in range(ints(1)[0]):
            exactly(ints(1)[0])
        while stream.peek(1):
            dimensions, length, kind = ints(3)
            shape = tuple(reversed(ints(dimensions)))
            name = exactly(length).decode()
            yield name, unpack(exactly(byte_count(shape, kind)), shape, kind)


@torch.no_grad()
def load_tensors(file: Path, model: Any) -> None:
    """Put what a file holds into a WhisperForConditionalGeneration of the same shape, in place of its own weights.

    Raises ExportError where the file lacks some or has others.
    """
    own = {ggml_name(name): tensor for name, tensor in model.state_dict().items() if name != "proj_out.weight"}
    found = set()
    for name, values in read_tensors(file):
        tensor = own.get(name)
        if tensor is None or tensor.numel() != values.size:
            raise ExportError(_("{path} does not fit the model at {name}: export again.").format(path=file, name=name))
        tensor.copy_(torch.from_numpy(values).reshape(tensor.shape))
        found.add(name)
    missing = own.keys() - found
    if missing:
        raise ExportError(_("{path} lacks the tensor {name}: export again.").format(path=file, name=min(missing)))
