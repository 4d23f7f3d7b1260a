"""Cards by name, by memory and as nvidia-smi lists them."""

from __future__ import annotations

import os
import stat
from importlib import metadata
from pathlib import Path

import pytest

from resonance.errors import ConfigError
from resonance.plan import devices
from resonance.units import GIBIBYTE, MEBIBYTE


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("RTX 3090", "RTX 3090"),
        ("3090", "RTX 3090"),
        ("rtx3060ti", "RTX 3060 Ti"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", "L40S"),
        ("a100-80gb", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
    ],
)
def test_a_card_is_known_by_the_names_that_people_and_drivers_use(text: str, card: str) -> None:
    assert devices.named(text).name == card


@pytest.mark.parametrize(
    "text", ["RTX A1000", "RTX 30900", "GT4", "", "RTX 3050 Ti", "RTX 3060 Laptop GPU", "2060 SUPER"]
)
def test_a_name_that_only_holds_a_cards_name_is_not_that_card(text: str) -> None:
    with pytest.raises(ConfigError, match="--gpu_memory 8GB"):
        devices.named(text)


def test_an_unknown_card_is_answered_with_those_near_it() -> None:
    with pytest.raises(ConfigError, match="RTX 3090") as caught:
        devices.named("RTX 3091")
    assert "H200" not in str(caught.value)


def test_memory_that_is_given_counts_for_a_named_card_too() -> None:
    half = devices.choose("RTX 3090", 12 * GIBIBYTE)
    assert (half.name, half.memory, half.free) == ("RTX 3090", 12 * GIBIBYTE, 12 * GIBIBYTE)


def test_a_table_of_nvidia_smi_gives_what_is_free_and_the_number_format() -> None:
    found = devices.read_nvidia("Tesla T4, 15360, 9000, 7.5\nNVIDIA A100-SXM4-80GB, 81920, 81000, 8.0\n")
    assert found is not None
    assert (found.name, found.memory, found.free) == ("Tesla T4", 15360 * MEBIBYTE, 9000 * MEBIBYTE)
    assert found.precision == "fp16"
    ampere = devices.read_nvidia("NVIDIA A800-SXM4-80GB, 81920, 81000, 8.0")  # a card that is not in the list
    assert ampere is not None and ampere.precision == "bf16" and ampere.memory == 81920 * MEBIBYTE


@pytest.mark.parametrize("table", ["", "No devices were found\n", "Tesla T4, [N/A], [N/A], 7.5\n"])
def test_a_driver_without_a_gpu_is_no_gpu(table: str) -> None:
    assert devices.read_nvidia(table) is None


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for nvidia-smi is a shell script")
def test_the_gpu_of_this_machine_is_found_through_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program.write_text(
        """#!/bin/sh
case "$*" in
  *--id=1*) echo 'Tesla T4, 15360, 15000, 7.5' ;;
  *) echo 'NVIDIA GeForce RTX 3060, 12288, 11000, 8.6' ;;
esac
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = devices.find()
    assert found.here and found.kind == "cuda" and found.free == 11000 * MEBIBYTE
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
        assert devices.find().kind != "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert devices.find().name == "Tesla T4"
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert devices.find().kind != "cuda"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    program.write_text("#!/bin/sh\necho 'Failed to initialize NVML'; exit 9\n")
    assert devices.find().kind != "cuda"


@pytest.mark.parametrize("names", [("memory.{}", "max", "current"), ("memory/memory.{}_in_bytes", "limit", "usage")])
def test_a_container_has_the_memory_that_it_is_given(names: tuple[str, str, str], tmp_path: Path) -> None:
    pattern, limit, used = names
    (tmp_path / "memory").mkdir()
    (tmp_path / pattern.format(limit)).write_text(f"{8 * GIBIBYTE}\n")
    (tmp_path / pattern.format(used)).write_text(f"{5 * GIBIBYTE}\n")
    (tmp_path / pattern.format(limit)).with_name("memory.stat").write_text(f"anon 7\ninactive_file {GIBIBYTE}\n")
    assert devices.container_memory(tmp_path) == (8 * GIBIBYTE, 4 * GIBIBYTE)


def test_a_machine_without_limits_has_all_its_memory(tmp_path: Path) -> None:
    assert devices.container_memory(tmp_path)[0] >= 1 << 60
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert devices.container_memory(tmp_path)[0] >= 1 << 60
