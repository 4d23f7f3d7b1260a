"""User-facing text in the user's language.

`_("English text with {name}")` returns the text in the language of `RESONANCE_LANG` (en, zh-CN, zh-TW), else of the
locale, else in English. Catalogues are `locales/<language>.json`: English text to translation. Call `.format(name=…)` on
the result, so that the text in the catalogue stays constant.
"""

from __future__ import annotations

import functools
import json
import os
from importlib import resources

LANGUAGES = ("en", "zh-CN", "zh-TW")


def language() -> str:
    """The user's language, one of `LANGUAGES`."""
    wanted = next(
        (os.environ[name] for name in ("RESONANCE_LANG", "LC_ALL", "LC_MESSAGES", "LANG") if os.environ.get(name)), "en"
    )
    tag = wanted.split(".")[0].replace("_", "-").lower()
    if not tag.startswith("zh"):
        return "en"
    return "zh-TW" if any(part in ("tw", "hk", "mo", "hant") for part in tag.split("-")) else "zh-CN"


@functools.cache
def catalogue(tag: str) -> dict[str, str]:
    """English text to text in language `tag`; empty for English."""
    if tag == "en":
        return {}
    text = resources.files("resonance").joinpath("locales", f"{tag}.json").read_text(encoding="utf-8")
    entries: dict[str, str] = json.loads(text)
    return entries


def _(english: str) -> str:
    """`english` in the user's language."""
    return catalogue(language()).get(english, english)
