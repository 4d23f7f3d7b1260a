"""What each normaliser takes out of a text, and what it must keep."""

from __future__ import annotations

import subprocess
import sys

import pytest

from resonance.evaluate.normalize import normalizer_for


@pytest.mark.parametrize(
    ("traditional", "simplified"),
    [
        ("我要喝水。", "我要喝水"),
        ("臺灣　ＡＰＰ，開一下！", "台湾app开一下"),
        ("看著急 甚麼計畫", "看着急什么计划"),  # OpenCC alone leaves 著, 甚 and 畫
        ("妳的帳戶", "你的账户"),
        ("打開 iPhone 13 的 app 嗎？", "打开iPhone 13的APP吗"),
        ("乾淨後面的頭髮", "干净后面的头发"),
    ],
)
def test_chinese_scripts_widths_and_punctuation_meet_in_one_text(traditional: str, simplified: str) -> None:
    apply = normalizer_for("zh").apply
    assert apply(traditional) == apply(simplified)


def test_chinese_words_of_taiwan_stay_the_words_that_were_said() -> None:
    # 滑鼠 and 鼠标 name the same thing, but one of them was said.
    apply = normalizer_for("zh-TW").apply
    assert apply("滑鼠") != apply("鼠标")


def test_chinese_text_in_round_brackets_counts_as_spoken() -> None:
    assert normalizer_for("zh").apply("东方商厦(嘉定店)") == "东方商厦嘉定店"


def test_english_follows_whisper_with_contractions_numbers_and_spelling() -> None:
    apply = normalizer_for("en", {"colour": "color"}).apply
    assert apply("The colour, won’t you? Twenty-one!") == "the color will not you 21"
    assert apply("Um,") == ""


def test_english_survives_a_loop_of_digits_longer_than_python_reads() -> None:
    assert normalizer_for("en").apply("7" * 5000) == "7" * 5000


def test_vowels_written_as_combining_marks_are_kept() -> None:
    assert normalizer_for("hi").apply("नमस्ते, दुनिया!") == "नमस्ते दुनिया"
    assert normalizer_for("thai").apply("ที่นี่ครับ!") == "ที่นี่ครับ"


def test_names_tell_apart_what_gives_different_scores() -> None:
    assert normalizer_for("en").name == "whisper-english-1-no-spelling-map"
    assert normalizer_for("English", {"colour": "color"}).name == "whisper-english-1"
    assert normalizer_for("chinese").name == "chinese-simplified-1"
    assert normalizer_for("fr").name == "whisper-basic-marks-1"
    assert normalizer_for(None).name == "mixed-simplified-1"


@pytest.mark.parametrize(
    ("language", "unit"),
    [
        ("zh-CN", "char"),
        ("yue", "char"),
        ("ja", "char"),
        ("km", "char"),
        ("de", "word"),
        ("ko", "word"),
        (None, "mixed"),
    ],
)
def test_languages_without_spaces_are_counted_by_character(language: str | None, unit: str) -> None:
    assert normalizer_for(language).unit == unit


def test_scoring_english_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from resonance.evaluate.metrics import score; score([('a', 'b')], 'en');"
        "sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
