"""An adapter read without PEFT: what PEFT would make of it, or refused with the reason."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from resonance.errors import AdapterError
from resonance.model.adapters import INFO_FILE, Info
from resonance.model.load import load_whisper
from resonance.model.lora import quiet_peft
from resonance.model.lora_weights import LoadedAdapter, read_adapter
from resonance.train.result import save_result

torch.set_num_threads(1)
CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


@dataclass
class Base:
    name: str
    fingerprint: str
    linear_shapes: dict[str, tuple[int, int]]
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> Base:
    whisper = load_whisper(str(tiny_model), device=CPU)
    linear = {n: m for n, m in whisper.model.named_modules() if isinstance(m, nn.Linear) and n != "proj_out"}
    return Base("tiny", whisper.fingerprint, {n: (m.in_features, m.out_features) for n, m in linear.items()})


def info_of(base: Base, **changes: Any) -> Info:
    said = {
        "kind": "lora",
        "base_model": "tiny",
        "base_fingerprint": base.fingerprint,
        "language": "en",
        "task": "transcribe",
        "audio_context": "auto",
        "audio_margin": 0.6,
        "normalizer": "basic",
        "scores": {},
        "data": {"train_rows": 9, "hours": 0.1},
        "settings": {},
        "versions": {},
    }
    return Info.model_validate(said | changes)


def save(folder: Path, tiny_model: Path, base: Base, config: LoraConfig, *, trained: bool = True) -> PeftModel:
    """An adapter folder as training leaves it; B is random unless it is not `trained`."""
    whisper = load_whisper(str(tiny_model), device=CPU)
    with quiet_peft():
        tuned = get_peft_model(whisper.model, config)
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if trained and "lora_B" in name:
            nn.init.normal_(parameter)
    save_result(folder, whisper, tuned, info_of(base))
    return tuned


@pytest.fixture(scope="module")
def plain(tiny_model: Path, base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A function that copies a good adapter of rank 4 on q_proj and v_proj."""
    made = tmp_path_factory.mktemp("plain") / "adapter"
    save(made, tiny_model, base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))

    def copy(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for path in made.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    return copy


def read(folder: Path, base: Base) -> LoadedAdapter:
    return read_adapter(folder, name="anna", version="1", base=base)


def refused(folder: Path, base: Base) -> str:
    with pytest.raises(AdapterError) as error:
        read(folder, base)
    assert "{" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


EXACT = {"r": 8, "lora_alpha": 12}
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"decoder\.layers\.1\..*\.v_proj": 7, "v_proj": 5},
    "alpha_pattern": {"encoder.layers.0.self_attn.q_proj": 3, "fc1": 40},
}


@pytest.mark.parametrize(
    "settings",
    [
        EXACT | {"target_modules": ["q_proj", "v_proj"]},
        EXACT | {"target_modules": "all-linear", "use_rslora": True},
        EXACT | {"target_modules": ["q_proj", "v_proj", "fc1"]} | PATTERNS,
        EXACT | {"target_modules": "all-linear", "use_rslora": True} | PATTERNS,
        EXACT | {"target_modules": r".*\.decoder\..*\.(q|v)_proj", "exclude_modules": ["encoder_attn.q_proj"]},
        EXACT | {"target_modules": ["fc2"], "init_lora_weights": "gaussian", "fan_in_fan_out": True},
        {"r": 1, "lora_alpha": 0.5, "target_modules": ["self_attn.out_proj"]},
        {"r": 512, "lora_alpha": 1, "target_modules": ["k_proj"]},
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_every_update_is_what_peft_would_add(
    settings: dict[str, Any], tiny_model: Path, base: Base, tmp_path: Path
) -> None:
    tuned = save(tmp_path / "adapter", tiny_model, base, LoraConfig(**settings))
    adapter = read(tmp_path / "adapter", base)
    theirs = {n: m for n, m in tuned.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    assert adapter.layers.keys() == theirs.keys() and len(theirs) >= 4
    for name, (a, b) in adapter.layers.items():
        assert (a.shape[1], b.shape[0]) == base.linear_shapes[name] and a.is_contiguous() and b.is_contiguous()
        delta = theirs[name].get_delta_weight("default")  # [out, in]
        torch.testing.assert_close(b @ a, delta.detach(), rtol=1e-5, atol=1e-6)


def test_it_knows_its_file_its_person_and_its_size_and_is_one_block_of_memory(
    plain: Callable[[Path], Path], base: Base, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "adapter")
    adapter = read(folder, base)
    assert (adapter.name, adapter.version, adapter.info.language) == ("anna", "1", "en")
    assert adapter.fingerprint == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    blocks = {matrix.untyped_storage().data_ptr() for pair in adapter.layers.values() for matrix in pair}
    assert len(blocks) == 1
    assert adapter.nbytes == 12 * 2 * 32 * 4 * 4  # 12 layers, A and B, 32 wide, rank 4, 4 bytes
    for dtype in (torch.float16, torch.bfloat16):
        half = read(folder, Base(base.name, base.fingerprint, base.linear_shapes, dtype))
        assert half.nbytes == adapter.nbytes // 2
        assert {matrix.dtype for pair in half.layers.values() for matrix in pair} == {dtype}
        one, other = (next(iter(x.layers.values()))[1].float() for x in (half, adapter))
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


def test_an_adapter_that_was_never_trained_is_what_it_says_it_is(tiny_model: Path, base: Base, tmp_path: Path) -> None:
    save(tmp_path / "adapter", tiny_model, base, LoraConfig(r=2, target_modules=["q_proj"]), trained=False)
    adapter = read(tmp_path / "adapter", base)
    assert len(adapter.layers) == 6 and not any(b.any() for _a, b in adapter.layers.values())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"peft_type": "IA3"}, "kind IA3; only LoRA"),
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),  # PEFT changes the base itself when it loads one
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
        ({"a_kind_of_next_year": ["x"]}, "a_kind_of_next_year"),
        ({"r": 0}, "r=0"),
        ({"r": 513}, "r=513, 1 … 512"),
        ({"r": True}, "r=True"),
        ({"rank_pattern": {"q_proj": -1}}, "r=-1"),
        ({"lora_alpha": "8"}, "lora_alpha"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"r": 5}, r"A \[4, 32\] and B \[32, 4\] where \[5, 32\] and \[32, 5\] belong"),
        ({"target_modules": ["q_proj", "v_proj", "fc1"]}, r"does not fit together: 4 layers .*fc1"),
        ({"target_modules": ["q_proj"]}, r"does not fit together: 6 layers .*v_proj"),
        ({"target_modules": "((a+)+)+b"}, "too involved"),
        ({"exclude_modules": ".?" * 25 + "X"}, "too involved"),
        ({"exclude_modules": "(.|.)" * 25 + "X"}, "too involved"),
        ({"exclude_modules": "(?x)(.+) +X"}, "too involved"),
        ({"alpha_pattern": {f".*.*X{i}": 1 for i in range(20)}}, "too involved"),
        ({"alpha_pattern": {"?x:(.+) +X": 1}}, "too involved"),
        ({"target_modules": ["q"] * 1001}, "too many"),
        ({"target_modules": "[q"}, "damaged"),
        ({"target_modules": None}, "damaged"),
        ({"target_modules": [5]}, "damaged"),
        ({"alpha_pattern": {".*.*.*.*.*x": 1}}, "too involved"),
        ({"rank_pattern": [1, 2]}, "damaged"),
    ],
)
def test_settings_that_are_more_than_plain_lora_are_refused_by_name(
    changes: dict[str, Any], expected: str, plain: Callable[[Path], Path], base: Base, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "adapter")
    change_config(folder, **changes)
    assert re.search(expected, refused(folder, base))


FIRST = "base_model.model.model.encoder.layers.0.self_attn.q_proj"


def test_weights_that_do_not_fit_are_refused_with_the_layer(
    plain: Callable[[Path], Path], base: Base, tmp_path: Path
) -> None:
    def check(expected: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        folder = plain(tmp_path / f"adapter {len(list(tmp_path.iterdir()))}")
        change_weights(folder, change)
        assert expected in refused(folder, base)

    a, b = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"
    conv, embedding = "base_model.model.model.encoder.conv1", "base_model.model.model.decoder.embed_tokens"
    check("layers.0.self_attn.q_proj", lambda w: w.pop(a))
    check("layers.0.self_attn.q_proj", lambda w: w.pop(b))
    check("1 layers", lambda w: (w.pop(a), w.pop(b)))
    check("holds no matrices", lambda w: w.clear())
    check("A [4, 31]", lambda w: w.update({a: w[a][:, 1:].contiguous()}))
    check("B [4, 32]", lambda w: w.update({b: w[b].T.contiguous()}))
    check("A [32]", lambda w: w.update({a: w[a][0].clone()}))
    check("I32", lambda w: w.update({a: w[a].int()}))
    check("zeros where model.encoder.layers.0", lambda w: w[a].zero_())
    check("zeros where model.encoder.layers.0", lambda w: w[a][3:].zero_())  # a copy that has not come to the end
    check("no numbers", lambda w: w[a].__setitem__((3, 7), float("nan")))
    check("no numbers", lambda w: w[b].__setitem__((0, 0), float("-inf")))
    check("DoRA", lambda w: w.update({f"{FIRST}.lora_magnitude_vector": torch.ones(32)}))
    check("an embedding or a convolution", lambda w: w.update({f"{conv}.lora_A.weight": torch.ones(4, 80, 3)}))
    check("an embedding or a convolution", lambda w: w.update({f"{embedding}.lora_embedding_A": torch.ones(4, 9)}))
    check("belongs to no linear layer of tiny", lambda w: w.update({f"{FIRST}x.lora_A.weight": w[a].clone()}))
    check("belongs to no linear layer", lambda w: w.update({"base_model.model.proj_out.weight": torch.ones(2)}))
    check("belongs to no linear layer", lambda w: w.update({f"{FIRST}.base_layer.bias": torch.ones(2)}))


def test_values_too_large_for_the_model_s_precision_are_refused(
    plain: Callable[[Path], Path], base: Base, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "adapter")
    change_weights(folder, lambda w: w[f"{FIRST}.lora_B.weight"].fill_(60_000))
    assert read(folder, base).nbytes
    half = Base(base.name, base.fingerprint, base.linear_shapes, torch.float16)
    assert "too large for float16" in refused(folder, half)


def test_another_base_a_full_model_and_half_a_folder_are_refused(
    plain: Callable[[Path], Path], base: Base, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "adapter")
    other = Base("openai/whisper-small", "f" * 64, base.linear_shapes)
    text = refused(folder, other)
    assert (
        "trained on tiny" in text and "openai/whisper-small (weights ffffffffffff)" in text and "--model tiny" in text
    )
    for changes, expected in (({"kind": "full"}, "--finetuning lora"), ({"base_fingerprint": None}, "weights –")):
        (folder / INFO_FILE).write_text(info_of(base, **changes).model_dump_json())
        assert expected in refused(folder, base)
    (folder / INFO_FILE).write_text(info_of(base).model_dump_json())
    for name in (WEIGHTS, "adapter_config.json", "tokenizer.json", INFO_FILE):
        away = (folder / name).rename(tmp_path / "away")
        assert name in refused(folder, base)
        away.rename(folder / name)
    assert read(folder, base).layers


@pytest.mark.parametrize("damage", ["cut", "header", "length", "nothing", "pickle", "large"])
def test_a_damaged_weights_file_is_refused_and_nothing_in_it_runs(
    damage: str, plain: Callable[[Path], Path], base: Base, tmp_path: Path
) -> None:
    class Explosive:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    folder = plain(tmp_path / "adapter")
    data = (folder / WEIGHTS).read_bytes()
    damaged = {
        "cut": data[:-100],
        "header": data[:8] + b"\xff" + data[9:],
        "length": b"\xff" * 8 + data[8:],
        "nothing": b"",
        "pickle": pickle.dumps(Explosive()),
        "large": data,
    }[damage]
    (folder / WEIGHTS).write_bytes(damaged)
    if damage == "large":
        os.truncate(folder / WEIGHTS, 1 << 40)  # a terabyte of nothing, as disks tell it
    assert WEIGHTS in refused(folder, base)
    assert not (tmp_path / "exploded").exists()


def lies(header: dict[str, Any], how: str) -> None:
    """Let a header of safetensors say what its format forbids."""
    first, second, *_others = (entry for key, entry in sorted(header.items()) if key.endswith("q_proj.lora_B.weight"))
    last = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
    if how == "same place":
        second["data_offsets"] = first["data_offsets"]
    elif how == "hole":
        for entry in header.values():
            if "data_offsets" in entry:
                entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    elif how == "beyond":
        second["data_offsets"] = [last, last + second["data_offsets"][1] - second["data_offsets"][0]]
    elif how == "before":
        first["data_offsets"] = [-8, first["data_offsets"][1]]
    elif how == "type":
        first["dtype"] = "F8_E4M3"


@pytest.mark.parametrize("how", ["same place", "hole", "beyond", "before", "type", "bytes behind"])
def test_matrices_that_share_or_leave_out_bytes_are_refused(
    how: str, plain: Callable[[Path], Path], base: Base, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "adapter")
    data = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    lies(header, how)
    text = json.dumps(header).encode()
    behind = b"12345678" if how in ("hole", "bytes behind") else b""
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + behind)
    assert "is damaged" in refused(folder, base)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"peft_type": "LORA"}', "\ud800", "x" * 2_000_000])
def test_a_damaged_config_is_refused(text: str, plain: Callable[[Path], Path], base: Base, tmp_path: Path) -> None:
    folder = plain(tmp_path / "adapter")
    (folder / "adapter_config.json").write_bytes(text.encode(errors="surrogatepass"))
    assert len(refused(folder, base)) < 600


def test_notes_of_an_adapter_that_fill_the_memory_are_not_read(
    plain: Callable[[Path], Path], base: Base, tmp_path: Path
) -> None:
    folder = plain(tmp_path / "adapter")
    path = folder / "resonance.json"
    path.write_text(path.read_text() + " " * (1 << 20))
    assert "too large" in refused(folder, base)
