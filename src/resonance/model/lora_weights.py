"""A LoRA adapter as weights in memory, without PEFT: read in milliseconds, shared by every batch that speaks with it.

What the matrices mean is PEFT's: an update is `scaling · B·A`, with scaling alpha/r, or alpha/√r with use_rslora
(`peft.tuners.lora.layer.LoraLayer.update_layer`). Whatever else an adapter may hold is refused here: half an adapter would
answer, and in the person's name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from resonance.errors import AdapterError
from resonance.messages import _
from resonance.model.adapters import Info, check_complete, read_info
from resonance.model.lora_config import MAX_RANK, LoraSettings, read_settings

WEIGHTS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")
_HEADER_ROOM = 16 << 20  # bytes of names and notes before the matrices
_BLOCK = 1 << 20  # bytes read at a time
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
_Pair = tuple[torch.Tensor, torch.Tensor]


class AdapterBase(Protocol):
    """The model that adapters are put on, as far as reading one goes."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str:
        """Of its weights, see `load.weights_fingerprint`."""
        ...

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers that an adapter may update: name -> (in, out)."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """The low-rank updates of one adapter. Never changed: a newer version is another object.

    layers: by the name of the linear layer in WhisperForConditionalGeneration (`model.encoder.layers.0.self_attn.q_proj`),
    A [rank, in] and B [out, rank] as in the file, B multiplied by the scaling, both in the model's precision and on its
    device; views of one block of `nbytes`.
    """

    name: str
    version: str
    fingerprint: str  # SHA-256 of adapter_model.safetensors, in hexadecimal
    info: Info
    layers: dict[str, _Pair]
    nbytes: int


def read_adapter(folder: Path, *, name: str, version: str, base: AdapterBase) -> LoadedAdapter:
    """The adapter in `folder`, ready for `base`. Reads JSON and safetensors only.

    One that was never trained (B all zero) is what it says it is. Raises AdapterError where a file is missing or damaged,
    where it was made for other weights, holds anything but plain LoRA matrices of linear layers, or lacks one of those that
    it is said to have.
    """
    info = read_info(folder)
    if info.kind != "lora":
        raise AdapterError(
            _(
                "{folder} holds a fully fine-tuned model, not a LoRA adapter. Train with --finetuning lora, or start a "
                "service of its own with this model."
            ).format(folder=folder)
        )
    check_complete(folder)
    if info.base_fingerprint != base.fingerprint:
        raise AdapterError(
            _(
                "The adapter {folder} was trained on {expected} (weights {expected_print}); the model here is {found} "
                "(weights {found_print}). Train it again on this one, or start a service with --model {expected}."
            ).format(
                folder=folder,
                expected=info.base_model,
                expected_print=(info.base_fingerprint or "–")[:12],
                found=base.name,
                found_print=base.fingerprint[:12],
            )
        )
    settings = read_settings(folder)
    header, data, fingerprint = _read(folder / WEIGHTS_FILE, base)
    pairs = _pairs(folder, _weights(folder / WEIGHTS_FILE, header, data), settings, base)
    layers = _ready(pairs, settings, base)
    matrices = [matrix for pair in layers.values() for matrix in pair]
    # A sum is a number where every value is one, and takes a thirtieth of the time.
    sums = torch.stack([matrix.sum(dtype=torch.float32) for matrix in matrices])
    if not sums.isfinite().all() and not all(matrix.isfinite().all() for matrix in matrices):
        raise AdapterError(
            _(
                "The adapter {folder} holds values that are no numbers, or too large for {dtype}. Train it again, with a "
                "smaller --learning_rate."
            ).format(folder=folder, dtype=str(base.dtype).removeprefix("torch."))
        )
    return LoadedAdapter(name, version, fingerprint, info, layers, matrices[0].untyped_storage().nbytes())


def _read(path: Path, base: AdapterBase) -> tuple[bytes, torch.Tensor, str]:
    """A safetensors file: its header, its matrices as uint8 [bytes], and the SHA-256 of both.

    Read, not mapped: a mapped file that somebody shortens ends the process (SIGBUS).
    """
    most = sum(into + out for into, out in base.linear_shapes.values()) * MAX_RANK * 8 + _HEADER_ROOM
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream, ThreadPoolExecutor(1) as aside:
            size = os.fstat(stream.fileno()).st_size
            if size > most:
                raise AdapterError(
                    _(
                        "{path} has {size} MB, more than any adapter of this model ({most} MB). Copy the adapter again."
                    ).format(path=path, size=size // 1_000_000, most=most // 1_000_000)
                )
            length = stream.read(8)
            header = stream.read(min(int.from_bytes(length, "little"), size))
            digest.update(length + header)
            data = torch.empty(size - stream.tell(), dtype=torch.uint8)
            room = data.numpy().data
            for start in range(0, len(room), _BLOCK):
                block = room[start : start + _BLOCK]
                found = stream.readinto(block)
                if found < len(block):  # shortened since: its last matrix will be missed
                    data = data[: start + found]
                    break
                aside.submit(digest.update, block)  # neither this nor reading holds the interpreter's lock
    except OSError as error:
        raise AdapterError(
            _("{path}: cannot be read ({reason}).").format(path=path, reason=error.strerror or error)
        ) from error
    return header, data, digest.hexdigest()


def _weights(path: Path, header: bytes, data: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, where they lie: `safetensors.torch.load` copies each, into memory that the system
    has to find first, which takes as long as all the rest.

    The format: https://github.com/huggingface/safetensors#format
    """
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        found, end = {}, 0
        for key, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = map(int, entry["data_offsets"])
            if first != end:  # as the format demands: two matrices in one place would be scaled twice
                raise ValueError(f"{key} begins at byte {first}, not {end}")
            part, end = data[first:last], last
            dtype = _DTYPES[entry["dtype"]]
            if first % dtype.itemsize:
                part = part.clone()
            found[key] = part.view(dtype).view(entry["shape"])
        if end != len(data):
            raise ValueError(f"{len(data)} bytes where {end} belong")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise _damaged(path, str(error)[:200]) from None


def _damaged(path: Path, reason: str) -> AdapterError:
    return AdapterError(_("{path} is damaged: {reason}. Copy the adapter again.").format(path=path, reason=reason))


def _pairs(
    folder: Path, weights: dict[str, torch.Tensor], settings: LoraSettings, base: AdapterBase
) -> dict[str, _Pair]:
    """A [rank, in] and B [out, rank] by layer, as they are in the file, each of them checked."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key in sorted(weights):
        found = _KEY.fullmatch(key)
        if found is None or found["layer"] not in base.linear_shapes:
            raise AdapterError(_stray(folder, key, base))
        sides.setdefault(found["layer"], {})[found["side"]] = weights[key]
    if not sides:
        raise AdapterError(
            _(
                "The adapter {folder} holds no matrices: the base model would answer in its name. Train it again."
            ).format(folder=folder)
        )
    lacking = [layer for layer in base.linear_shapes if settings.updates(layer) != (layer in sides)]
    lacking += [layer for layer, pair in sides.items() if len(pair) < 2]
    if lacking:
        raise AdapterError(
            _(
                "The adapter {folder} does not fit together: {count} layers have matrices and should not, or should and have "
                "none (such as {name}). Copy the adapter again."
            ).format(folder=folder, count=len(lacking), name=min(lacking))
        )
    pairs = {}
    for layer, pair in sides.items():
        rank, (into, out) = settings.rank(layer), base.linear_shapes[layer]
        a, b = pair["A"], pair["B"]
        if a.shape != (rank, into) or b.shape != (out, rank):
            raise AdapterError(
                _(
                    "The adapter {folder} does not fit {layer}: it has A {a} and B {b} where {wanted_a} and {wanted_b} "
                    "belong. It was made for another model, or damaged."
                ).format(
                    folder=folder,
                    layer=layer,
                    a=list(a.shape),
                    b=list(b.shape),
                    wanted_a=[rank, into],
                    wanted_b=[out, rank],
                )
            )
        if not a[-1].any():
            # Never so in training. It is what a copy leaves that reserved the room and has not come so far.
            raise AdapterError(
                _("The adapter {folder} holds zeros where {layer} has weights. Copy it again, completely.").format(
                    folder=folder, layer=layer
                )
            )
        pairs[layer] = (a, b)
    return pairs


def _stray(folder: Path, key: str, base: AdapterBase) -> str:
    if "lora_magnitude_vector" in key:
        return _(
            "The adapter {folder} is a DoRA adapter ({key}), which cannot be mixed with others. Train it without DoRA."
        ).format(folder=folder, key=key)
    if "lora_embedding_" in key or ".conv" in key:
        return _(
            "The adapter {folder} updates an embedding or a convolution ({key}); only linear layers can differ from person "
            "to person. Train it with --target_modules of linear layers."
        ).format(folder=folder, key=key)
    return _("The adapter {folder} holds {key}, which belongs to no linear layer of {base}.").format(
        folder=folder, key=key, base=base.name
    )


def _ready(pairs: dict[str, _Pair], settings: LoraSettings, base: AdapterBase) -> dict[str, _Pair]:
    """The matrices as they are multiplied: B scaled, in the model's precision and on its device, in one block.

    Float32 for a model in float32 stays where it was read to: whisper-small's 14 MB at rank 32 are not copied.
    """
    where = {matrix.untyped_storage().data_ptr() for pair in pairs.values() for matrix in pair}
    if len(where) > 1 or any(matrix.dtype != torch.float32 for pair in pairs.values() for matrix in pair):
        pairs = _one_block(pairs, torch.float32, torch.device("cpu"))
    for layer, (_a, b) in pairs.items():  # in float32: the values of a 16-bit file would otherwise be rounded twice
        b.mul_(settings.scaling(layer))
    if base.dtype == torch.float32 and base.device.type == "cpu":
        return pairs
    return _one_block(pairs, base.dtype, base.device)


def _one_block(pairs: dict[str, _Pair], dtype: torch.dtype, device: torch.device) -> dict[str, _Pair]:
    matrices = [matrix for pair in pairs.values() for matrix in pair]
    flat = torch.cat([matrix.flatten() for matrix in matrices]).to(dtype).to(device)
    parts = iter(flat.split_with_sizes([matrix.numel() for matrix in matrices]))
    return {layer: (next(parts).view(a.shape), next(parts).view(b.shape)) for layer, (a, b) in pairs.items()}
