"""Every text that a user can see is there in all three languages."""

from __future__ import annotations

import ast
import json
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

from resonance import messages
from resonance.config import CurveConfig, TrainConfig
from resonance.config_export import ExportConfig
from resonance.config_plan import PlanConfig
from resonance.config_recognizer import EvaluateConfig, TranscribeConfig
from resonance.config_sagemaker import SubmitConfig
from resonance.config_serve import ServeConfig

SOURCE = Path(messages.__file__).parent


def literals() -> Iterator[tuple[str, str]]:
    """(where, text) of every `_("…")` in the package, and of the settings' help, which is looked up when printed."""
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_":
                where = f"{path.relative_to(SOURCE)}:{node.lineno}"
                if isinstance(node.args[0], ast.Constant):
                    yield where, node.args[0].value
                else:  # only the help of settings, which comes below
                    assert path.name == "config_help.py", f"{where}: _() takes a literal"
    for model in (
        TrainConfig,
        PlanConfig,
        CurveConfig,
        EvaluateConfig,
        TranscribeConfig,
        ExportConfig,
        ServeConfig,
        SubmitConfig,
    ):
        yield from ((model.__name__, " ".join(paragraph.split())) for paragraph in (model.__doc__ or "").split("\n\n"))
        yield from ((model.__name__, title) for title in model.groups.values())
        for name, field in model.model_fields.items():
            yield f"{model.__name__}.{name}", " ".join((field.description or "").split())


def placeholders(text: str) -> set[str]:
    return {name for _before, name, _spec, _conversion in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("tag", ["zh-CN", "zh-TW"])
def test_every_text_is_translated_with_the_same_placeholders(tag: str) -> None:
    translations = messages.catalogue(tag)
    missing = {text: where for where, text in literals() if text not in translations}
    assert not missing, json.dumps(missing, ensure_ascii=False, indent=1)
    wrong = {
        text: translations[text]
        for _where, text in literals()
        if "{" in text and placeholders(text) != placeholders(translations[text])
    }
    assert not wrong, json.dumps(wrong, ensure_ascii=False, indent=1)


@pytest.mark.parametrize("tag", ["zh-CN", "zh-TW"])
def test_no_translation_is_left_of_a_text_that_is_gone(tag: str) -> None:
    used = {text for _where, text in literals()}
    assert sorted(set(messages.catalogue(tag)) - used) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [("zh_CN.UTF-8", "zh-CN"), ("zh_TW", "zh-TW"), ("zh-Hant-HK", "zh-TW"), ("en_GB.UTF-8", "en"), ("de_DE", "en")],
)
def test_the_language_follows_the_locale(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESONANCE_LANG", raising=False)
    monkeypatch.setenv("LC_ALL", given)
    assert messages.language() == expected
