"""`resonance doctor`: tells what is here, and how to repair what is not."""

from __future__ import annotations

import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from resonance import doctor
from resonance.cli import run


def test_a_sound_installation_is_reported_in_aligned_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("Python", "torch", "memory", "disk", "GPU", "libsndfile", "FFmpeg", "bitsandbytes", "wandb"):
        assert any(line.startswith(f"  {name}") for line in lines), name
    rows = {line.split()[0]: line for line in lines if line.startswith("  ") and line.strip()}
    assert len({rows[name].index(metadata.version(name)) for name in ("torch", "transformers", "bitsandbytes")}) == 1


def test_names_in_chinese_are_aligned_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.cells import cell_len

    monkeypatch.setattr(doctor, "machine", lambda: [("記憶體", "8 GiB"), ("disk", "9 GiB")])
    doctor.print_report()
    columns = [
        cell_len(line.split(amount)[0])
        for line in capsys.readouterr().out.splitlines()
        for amount in ("8 GiB", "9 GiB")
        if amount in line
    ]
    assert len(columns) == 2
    assert columns[0] == columns[1]


def test_a_package_that_is_too_old_fails_with_the_command_that_repairs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "peft" else real(name))
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "peft is 0.1, but >=" in out
    assert '-m pip install "peft>=' in out or ' pip install "peft>=' in out


def test_a_package_that_cannot_be_imported_fails_with_its_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor.importlib.import_module

    def import_module(name: str) -> object:
        if name == "soundfile":
            raise OSError("sndfile library not found\nlong story")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "soundfile is installed but cannot be used (sndfile library not found)" in out
    assert f"--force-reinstall --no-deps soundfile=={metadata.version('soundfile')}" in out


@pytest.mark.parametrize(
    ("cuda_build", "driver", "said"),
    [
        (None, None, "none found"),
        (None, "/usr/bin/nvidia-smi", "built without CUDA"),
        ("13.0", "/usr/bin/nvidia-smi", "finds no card"),
    ],
)
def test_why_there_is_no_gpu(
    cuda_build: str | None, driver: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda_build),
        cuda=SimpleNamespace(is_available=lambda: False),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
    )
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    assert said in next(doctor.devices(torch))[1]  # type: ignore[arg-type]


def test_every_card_is_named_with_its_memory() -> None:
    cards = [
        SimpleNamespace(name="RTX 3060 Ti", total_memory=8 << 30),
        SimpleNamespace(name="H200", total_memory=141 << 30),
    ]
    torch = SimpleNamespace(
        cuda=SimpleNamespace(
            is_available=lambda: True, device_count=lambda: len(cards), get_device_properties=lambda i: cards[i]
        )
    )
    assert [*doctor.devices(torch)] == [("GPU 0", "RTX 3060 Ti, 8.0 GiB"), ("GPU 1", "H200, 141.0 GiB")]  # type: ignore[arg-type]


def test_an_optional_package_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    rows = [*doctor.optional()]
    place = next(i for i, (name, _text) in enumerate(rows) if name == "wandb")
    assert "--use_wandb" in rows[place][1]
    assert rows[place + 1][1].endswith('pip install "wandb>=0.19"')


def test_optional_packages_ask_for_the_versions_of_the_package_itself() -> None:
    declared = {text.split(";")[0].strip() for text in metadata.requires("resonance-asr") or [] if "extra ==" in text}
    asked = {text.partition(' install "')[2].rstrip('"') for _name, text in doctor.optional() if " install " in text}
    assert {name for name in asked if ">=" in name} <= declared


def test_a_hub_out_of_reach_is_no_failure_and_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--hub"]) == 0  # tests run with HF_HUB_OFFLINE=1
    out = capsys.readouterr().out
    assert "not reached (switched off by HF_HUB_OFFLINE)" in out
    assert "--model_name_or_path" in out


def test_without_being_asked_the_hub_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked the hub"))
    assert any("--hub" in text for _name, text in doctor.hub(ask=False))


def test_a_flag_it_does_not_know_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--hubb"]) == 2
    assert "--hubb" in capsys.readouterr().err


def test_pip_is_the_one_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/elsewhere/bin/pip")
    monkeypatch.setattr(sys, "executable", "/folder/python")
    assert doctor.pip() == "/folder/python -m pip"
    monkeypatch.setattr(sys, "executable", "/a folder/python")
    assert doctor.pip() == '"/a folder/python" -m pip'
