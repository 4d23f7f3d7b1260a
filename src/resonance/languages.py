"""Whisper's 100 languages: the codes it has tokens for, and the names people type instead.

Source: openai/whisper `tokenizer.py`. Models before large-v3 have no Cantonese (`yue`).
"""

from __future__ import annotations

import difflib

from resonance.messages import _

LANGUAGES = {
    "en": "english",
    "zh": "chinese",
    "de": "german",
    "es": "spanish",
    "ru": "russian",
    "ko": "korean",
    "fr": "french",
    "ja": "japanese",
    "pt": "portuguese",
    "tr": "turkish",
    "pl": "polish",
    "ca": "catalan",
    "nl": "dutch",
    "ar": "arabic",
    "sv": "swedish",
    "it": "italian",
    "id": "indonesian",
    "hi": "hindi",
    "fi": "finnish",
    "vi": "vietnamese",
    "he": "hebrew",
    "uk": "ukrainian",
    "el": "greek",
    "ms": "malay",
    "cs": "czech",
    "ro": "romanian",
    "da": "danish",
    "hu": "hungarian",
    "ta": "tamil",
    "no": "norwegian",
    "th": "thai",
    "ur": "urdu",
    "hr": "croatian",
    "bg": "bulgarian",
    "lt": "lithuanian",
    "la": "latin",
    "mi": "maori",
    "ml": "malayalam",
    "cy": "welsh",
    "sk": "slovak",
    "te": "telugu",
    "fa": "persian",
    "lv": "latvian",
    "bn": "bengali",
    "sr": "serbian",
    "az": "azerbaijani",
    "sl": "slovenian",
    "kn": "kannada",
    "et": "estonian",
    "mk": "macedonian",
    "br": "breton",
    "eu": "basque",
    "is": "icelandic",
    "hy": "armenian",
    "ne": "nepali",
    "mn": "mongolian",
    "bs": "bosnian",
    "kk": "kazakh",
    "sq": "albanian",
    "sw": "swahili",
    "gl": "galician",
    "mr": "marathi",
    "pa": "punjabi",
    "si": "sinhala",
    "km": "khmer",
    "sn": "shona",
    "yo": "yoruba",
    "so": "somali",
    "af": "afrikaans",
    "oc": "occitan",
    "ka": "georgian",
    "be": "belarusian",
    "tg": "tajik",
    "sd": "sindhi",
    "gu": "gujarati",
    "am": "amharic",
    "yi": "yiddish",
    "lo": "lao",
    "uz": "uzbek",
    "fo": "faroese",
    "ht": "haitian creole",
    "ps": "pashto",
    "tk": "turkmen",
    "nn": "nynorsk",
    "mt": "maltese",
    "sa": "sanskrit",
    "lb": "luxembourgish",
    "my": "myanmar",
    "bo": "tibetan",
    "tl": "tagalog",
    "mg": "malagasy",
    "as": "assamese",
    "tt": "tatar",
    "haw": "hawaiian",
    "ln": "lingala",
    "ha": "hausa",
    "ba": "bashkir",
    "jw": "javanese",
    "su": "sundanese",
    "yue": "cantonese",
}

OTHER_NAMES = {
    "burmese": "my",
    "castilian": "es",
    "flemish": "nl",
    "haitian": "ht",
    "letzeburgesch": "lb",
    "mandarin": "zh",
    "moldavian": "ro",
    "moldovan": "ro",
    "panjabi": "pa",
    "pushto": "ps",
    "sinhalese": "si",
    "valencian": "ca",
    "中文": "zh",
    "普通话": "zh",
    "國語": "zh",
    "国语": "zh",
    "粤语": "yue",
    "粵語": "yue",
}

_CODES = {name: code for code, name in LANGUAGES.items()} | OTHER_NAMES | {code: code for code in LANGUAGES}


def language_code(text: str) -> str:
    """Whisper's code for a code, a tag with a region (zh-TW) or a name (Chinese, Mandarin), in any case.

    Raises ValueError, with the nearest names, where Whisper knows no such language.
    """
    wanted = text.strip().lower().replace("_", "-")
    code = _CODES.get(wanted) or _CODES.get(wanted.split("-")[0])
    if code:
        return code
    near = difflib.get_close_matches(wanted, _CODES, n=3, cutoff=0.7)
    if near:
        suggestion = ", ".join(f"{name} ({_CODES[name]})" if name != _CODES[name] else name for name in near)
        raise ValueError(_("Whisper knows no such language. Did you mean {suggestion}?").format(suggestion=suggestion))
    raise ValueError(
        _("Whisper knows no such language. Give a code or an English name, such as zh, Chinese, en, English.")
    )
