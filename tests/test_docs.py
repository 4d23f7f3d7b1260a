"""What README and docs tell people to type is what the program takes."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resonance import cli, cli_data
from resonance.config import CurveConfig, TrainConfig
from resonance.config_export import ExportConfig
from resonance.config_io import load_yaml, parse
from resonance.config_plan import PlanConfig
from resonance.config_recognizer import EvaluateConfig, TranscribeConfig
from resonance.config_sagemaker import SubmitConfig
from resonance.config_serve import ServeConfig
from resonance.data.formats import load_manifest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
MODELS = {
    "plan": PlanConfig,
    "train": TrainConfig,
    "curve": CurveConfig,
    "evaluate": EvaluateConfig,
    "transcribe": TranscribeConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
    "submit": SubmitConfig,
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class _Parsed(Exception):  # noqa: N818 - stops a command behind its parser
    pass


def check(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse the command line of `words`, and run nothing. Raises ConfigError where it is wrong."""
    if words[0] == "export" and "=$(" in words[1]:  # export TOKEN=$(resonance …)
        words = [words[1].partition("=$(")[2], *words[2:-1], words[-1].removesuffix(")")]
    if words[0] == "docker" and "run" in words:  # a command in the container
        words = ["resonance", *words[words.index("resonance") + 1 :]]
    if words[0] == "python" and words[1].startswith("scripts/"):
        assert (ROOT / words[1]).is_file()
        words = ["resonance", "train" if "finetune" in words[1] else "transcribe", *words[2:]]
    if words[0] != "resonance":
        assert (
            words[0]
            in (
                *("source", "export", "tensorboard", "hf", "make", "git", "cd", "pip", "aws"),
                *("torchrun", "accelerate", "deepspeed", "srun", "DS_BUILD_OPS=0"),
                *("mkdir", "cp", "zip", "arecord", "curl", "sudo", "docker", "kubectl", "ray", "umask"),
            )
            or (ROOT / words[0]).is_file()
        )
        return
    name, *arguments = words[1:]
    if [name, *arguments[:1]] == ["sagemaker", "submit"]:
        name, *arguments = "submit", *arguments[1:]
        if "--config" in arguments:
            arguments += ["--instance_type", "ml.g5.2xlarge"]
    if name in MODELS:
        if "--resume" in arguments or "--config" in arguments:  # their settings come from a file
            arguments = [*arguments, "--train_file", "recordings"]
        if "--config" in arguments:
            place = arguments.index("--config")
            del arguments[place : place + 2]
        parse(MODELS[name], arguments, "resonance")
        return

    def parse_args(self: Any, argv: list[str]) -> None:
        super(cli_data.Parser, self).parse_args(argv)
        raise _Parsed

    monkeypatch.setattr(cli_data.Parser, "parse_args", parse_args)
    run: Callable[[list[str]], int] = cli.COMMANDS.get(name, lambda argv: cli.group(name, argv))
    with contextlib.suppress(_Parsed):
        run(arguments)
        pytest.fail(f"{words} was not parsed")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_taken(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(page):
        check(words, monkeypatch)


def test_a_wrong_flag_in_a_page_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from resonance.errors import ConfigError

    for line in ("resonance train --output_dir x --train_file y --learn_rate 1", "resonance data check x --fixx y"):
        with pytest.raises(ConfigError):
            check(shlex.split(line), monkeypatch)


def test_the_tutorials_have_the_same_commands_in_every_language() -> None:
    def typed(page: str) -> list[list[str]]:
        return [words for words in commands(ROOT / page) if words[0] != "export"]

    least = {
        "README": 7,
        "docs/tutorial": 7,
        "docs/how-to-sagemaker": 7,
        "docs/how-to-transcribe": 7,
        "docs/how-to-export": 4,
        "docs/how-to-serve": 30,
    }
    for name, count in least.items():
        assert len(typed(f"{name}.md")) >= count
        for tag in ("zh-CN", "zh-TW"):
            assert typed(f"{name}.{tag}.md") == typed(f"{name}.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _hash, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page.name}: {target}"


def test_the_manifests_that_are_shown_can_be_read(tmp_path: Path) -> None:
    page = ROOT / "docs" / "how-to.md"
    shown = [block for language in ("json", "csv", "tsv") for block in blocks(page, language)]
    assert len(shown) == 6
    for block in [
        *shown,
        *(block for tag in ("", ".zh-CN", ".zh-TW") for block in blocks(ROOT / "docs" / f"tutorial{tag}.md", "json")),
    ]:
        (tmp_path / "list").write_text(block, encoding="utf-8")
        rows = load_manifest(tmp_path / "list").utterances
        assert rows and all(row.text for row in rows), block


def test_the_settings_file_that_is_shown_can_be_read(tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs" / "how-to.md", "yaml")
    (tmp_path / "anna.yaml").write_text(block + "output_dir: runs/anna\n", encoding="utf-8")
    assert load_yaml(TrainConfig, tmp_path / "anna.yaml").max_steps == 300


@pytest.mark.parametrize("tag", ["", ".zh-CN", ".zh-TW"])
def test_the_settings_file_of_a_job_can_be_read(tag: str, tmp_path: Path) -> None:
    (block,) = blocks(ROOT / "docs" / f"how-to-sagemaker{tag}.md", "yaml")
    (tmp_path / "large.yaml").write_text(block + "data: s3://my-bucket/hours\n", encoding="utf-8")
    config = load_yaml(SubmitConfig, tmp_path / "large.yaml")
    assert (config.instance_count, config.max_steps, config.finetuning) == (2, 1024, "full")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_program_says() -> None:
    generator = script("generate_reference")
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run: python docs/generate_reference.py"


def test_the_plots_show_what_the_model_of_the_bytes_says() -> None:
    plots = script("draw_memory")
    for name, text in plots.pages().items():
        assert (plots.FOLDER / name).read_text(encoding="utf-8") == text, "run: python docs/draw_memory.py"


def test_no_page_names_a_place_on_somebodys_machine() -> None:
    for page in PAGES:
        found = re.search(r"/(?:work|home|root|Users|tmp)/\w", page.read_text(encoding="utf-8"))
        assert found is None, f"{page.name}: {found}"
