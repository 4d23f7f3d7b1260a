"""Text normalisers by language: what is taken out of both texts before errors are counted.

Scores of the same transcripts differ by up to ten points with the normaliser, so each has a versioned name that is
printed beside every score:

    whisper-english-1                   transformers' EnglishTextNormalizer: contractions, numbers, British spelling;
                                        curly apostrophes made straight before
    whisper-english-1-no-spelling-map   the same where the model came without its list of British spellings
    chinese-simplified-1                whisper-basic-marks-1, every character folded to Simplified Chinese, but the
                                        text in round brackets stays: in Chinese transcripts it is spoken, 商厦(嘉定店)
    mixed-simplified-1                  the steps of chinese-simplified-1, for an unknown language or several together
    whisper-basic-marks-1               Whisper's BasicTextNormalizer with combining marks kept: Whisper's own drops the
                                        vowels of Thai, Burmese, Hindi, Tamil …

Not folded, in any language but English: numbers written as digits or as words ("3" and "三" differ).
"""

from __future__ import annotations

import functools
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from resonance.errors import MissingExtraError
from resonance.languages import language_code
from resonance.messages import _

if TYPE_CHECKING:
    from opencc import OpenCC

Unit = Literal["word", "char", "mixed"]

# Scripts written without spaces between words, as ranges of a regular expression's character class: Thai, Lao, Burmese,
# Khmer, kana, Chinese characters with their extensions and the repetition marks 々 and 〇.
UNSPACED_SCRIPTS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
UNSPACED_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
CHINESE_LANGUAGES = frozenset({"zh", "yue"})
# What OpenCC's table from Traditional to Simplified leaves alone because it depends on the word. Folded on both sides,
# so the word does not matter: 著急 and 着急, 瞭解 and 了解, 妳 and 你 are the same speech.
MORE_FOLDED_CHARACTERS = dict(zip("著祇帐姊麽妳牠揹瞭姪砲粧荳籐", "着只账姐么你它背了侄炮妆豆藤", strict=True))
FOLDED_WORDS = {"甚么": "什么", "计画": "计划"}


@dataclass(frozen=True, slots=True)
class Normalizer:
    """A named way to prepare texts. `unit` is what errors are counted in: it picks the main metric."""

    name: str
    unit: Unit
    apply: Callable[[str], str]


def normalizer_for(language: str | None, spellings: Mapping[str, str] | None = None) -> Normalizer:
    """The normaliser of `language`: a code ("zh"), a tag ("zh-TW") or Whisper's name ("chinese").

    None means unknown or several languages. `spellings` is British to American, for English: the tokenizer's
    `english_spelling_normalizer`, from `normalizer.json` beside the model.
    """
    if language is None:
        return Normalizer("mixed-simplified-1", "mixed", chinese)
    try:
        code = language_code(language)
    except ValueError:  # transcripts in a language that Whisper has no token for can still be scored
        code = language
    if code == "en":
        name = "whisper-english-1" if spellings else "whisper-english-1-no-spelling-map"
        return Normalizer(name, "word", english(spellings or {}))
    if code in CHINESE_LANGUAGES:
        return Normalizer("chinese-simplified-1", "char", chinese)
    return Normalizer("whisper-basic-marks-1", "char" if code in UNSPACED_LANGUAGES else "word", basic)


def basic(text: str) -> str:
    """Lower case, NFKC, no bracketed remarks, no punctuation or symbols, single spaces."""
    return _letters_and_digits(re.sub(r"\(([^)]+?)\)", "", text))


def chinese(text: str) -> str:
    """Folded to Simplified Chinese, without punctuation, without the spaces around Chinese characters."""
    text = _letters_and_digits(text).translate(_simplified())
    for variant, usual in FOLDED_WORDS.items():
        text = text.replace(variant, usual)
    return re.sub(f"(?<=[{UNSPACED_SCRIPTS}]) | (?=[{UNSPACED_SCRIPTS}])", "", text)


def _letters_and_digits(text: str) -> str:
    text = unicodedata.normalize("NFKC", re.sub(r"[<\[][^>\]]*[>\]]", "", text.lower()))
    return " ".join("".join(" " if unicodedata.category(c)[0] in "SP" else c for c in text).lower().split())


def english(spellings: Mapping[str, str]) -> Callable[[str], str]:
    """Whisper's English normaliser with `spellings`, British to American."""
    whisper = _english_module().EnglishTextNormalizer(dict(spellings))

    def apply(text: str) -> str:
        try:
            return " ".join(whisper(text.replace("’", "'")).split())
        except ValueError:  # a loop of more digits than Python reads as one number (4300)
            return basic(text)

    return apply


@functools.cache
def _english_module() -> ModuleType:
    """`transformers.models.whisper.english_normalizer`, run from its file.

    Importing it the usual way brings in all of transformers: 2.2 s, against 0.03 s for the file alone.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        raise MissingExtraError(_("transformers is not installed. Install it with: pip install transformers"))
    file = Path(package.origin).parent / "models" / "whisper" / "english_normalizer.py"
    spec = importlib.util.spec_from_file_location("transformers.models.whisper.english_normalizer", file)
    assert spec is not None and spec.loader is not None  # true of every .py path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Simplified(dict[int, str]):
    """Table for `str.translate`, filled as characters turn up.

    One character at a time, since a fold that looks at the neighbours would answer differently on the two sides of a
    comparison.
    """

    def __missing__(self, code: int) -> str:
        character = chr(code)
        folded: str = _traditional_to_simplified().convert(character) if code >= 0x3400 else character
        self[code] = MORE_FOLDED_CHARACTERS.get(folded, folded)
        return self[code]


@functools.cache
def _simplified() -> _Simplified:
    return _Simplified()


@functools.cache
def _traditional_to_simplified() -> OpenCC:
    from opencc import OpenCC

    return OpenCC("t2s")
