"""The values of a form: each is what it should be, or the request is refused saying what was found."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resonance.languages import language_code
from resonance.messages import _
from resonance.serve.faults import ServiceError

if TYPE_CHECKING:
    from resonance.transcribe.phrases import PhraseHelp

Fields = Mapping[str, Sequence[str]]  # by name, in the order they were sent

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
SHOWN = 60  # characters of a wrong value that a message repeats
MOST_PHRASES = 10_000
LONGEST_PHRASE = 200  # characters; the decoder holds 448 tokens
LONGEST_PROMPT = 2000  # characters; the decoder holds 223 tokens of what was said before


def only_known(fields: Fields, known: Collection[str]) -> None:
    """Raises ServiceError for a field that means nothing here: a mistyped one would be left out without a word."""
    import difflib

    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = (
                _("Did you mean {near}?").format(near=near[0])
                if near
                else _("Known fields: {names}.").format(names=", ".join(sorted(known)))
            )
            raise ServiceError(
                400, "unknown_field", _("There is no field {name}.").format(name=shown(name)), hint, param=name[:SHOWN]
            )


def once(fields: Fields, name: str) -> str | None:
    """The one value of a field, be it empty; None where it was left out."""
    values = fields.get(name, ())
    if len(values) > 1:
        raise ServiceError(
            400,
            "duplicate_field",
            _("{name} is given {count} times.").format(name=name, count=len(values)),
            _("Give it once."),
            param=name,
        )
    return values[0] if values else None


def encodable(name: str, value: str) -> str:
    """`value`. Raises ServiceError 400 where it has half a character, which JSON can name and nothing can write."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise wrong(name, value, _("It has a character that is not one."))
    return value


def text(fields: Fields, name: str, longest: int = LONGEST_PROMPT) -> str | None:
    """The one value of a field; None where it was left out or is empty."""
    value = once(fields, name)
    if value is None or not value.strip():
        return None
    if len(value) > longest:
        raise ServiceError(
            400,
            "value_too_long",
            _("{name} has {found} characters; {most} are allowed.").format(name=name, found=len(value), most=longest),
            _("Shorten it."),
            param=name,
        )
    return encodable(name, value)


def choice(fields: Fields, name: str, allowed: Sequence[str], default: str, *, code: str = "invalid_value") -> str:
    value = text(fields, name)
    if value is None:
        return default
    if value not in allowed:
        raise wrong(name, value, _("It must be one of {choices}.").format(choices=", ".join(allowed)), code=code)
    return value


def choices(fields: Fields, name: str, allowed: Sequence[str]) -> list[str]:
    """Each value of a field that may be given several times, with commas or as `name[]`."""
    given = [*fields.get(name, ()), *fields.get(f"{name}[]", ())]
    found = [part.strip() for value in given for part in value.split(",") if part.strip()]
    for value in found:
        if value not in allowed:
            raise wrong(name, value, _("It must be one of {choices}.").format(choices=", ".join(allowed)))
    return list(dict.fromkeys(found))


def number(fields: Fields, name: str, least: float, most: float, default: float) -> float:
    value = text(fields, name)
    if value is None:
        return default
    try:
        found = float(value) if value.isascii() and "_" not in value else math.nan
    except ValueError:
        found = math.nan
    if not least <= found <= most:
        raise wrong(
            name, value, _("It must be a number from {least} to {most}.").format(least=f"{least:g}", most=f"{most:g}")
        )
    return found


def whole(fields: Fields, name: str, least: int, most: int, default: int) -> int:
    value = text(fields, name)
    if value is None:
        return default
    plain = value.strip()
    if not (plain.isascii() and plain.isdigit() and len(plain) < 10 and least <= int(plain) <= most):
        raise wrong(name, value, _("It must be a whole number from {least} to {most}.").format(least=least, most=most))
    return int(plain)


def flag(fields: Fields, name: str, default: bool) -> bool:
    value = text(fields, name)
    if value is None:
        return default
    word = value.strip().lower()
    if word not in (*TRUE, *FALSE):
        raise wrong(name, value, _("It must be true or false."))
    return word in TRUE


def language(fields: Fields, name: str = "language") -> str | None:
    value = text(fields, name)
    return None if value is None else code_of(value, name)


def code_of(value: str, name: str = "language") -> str:
    """Whisper's code of a language. Raises ServiceError 400 unsupported_language with the nearest ones."""
    try:
        return language_code(value)
    except ValueError as error:
        raise wrong(name, value, str(error), code="unsupported_language") from None


def many(fields: Fields, name: str) -> list[str]:
    """The values of a field that holds several: given again and again, one a line, or as a JSON list."""
    found: list[str] = []
    for value in (*fields.get(name, ()), *fields.get(f"{name}[]", ())):
        if value.lstrip().startswith("["):
            found += _json_list(name, value)
        else:
            found += value.splitlines()
    return [" ".join(encodable(name, part).split()) for part in found if part.strip()]


def _json_list(name: str, value: str) -> list[str]:
    try:
        listed = json.loads(value)
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list) or not all(isinstance(part, str) for part in listed):
        raise wrong(name, value, _("It begins like a JSON list, and must be one of texts."))
    return listed


def phrase_help(fields: Fields) -> PhraseHelp | None:
    """What this person says, from `phrases`, `phrases_only`, `phrases_weight` and `phrases_threshold`."""
    from resonance.transcribe.phrases import PhraseHelp, spoken

    only = flag(fields, "phrases_only", False)
    weight = number(fields, "phrases_weight", 0, 100, 1.0)
    threshold = number(fields, "phrases_threshold", 0, 1, 0.5)
    given = many(fields, "phrases")
    if len(given) > MOST_PHRASES:
        raise wrong(
            "phrases", given[0], _("At most {most} phrases are allowed.").format(most=MOST_PHRASES), code="too_many"
        )
    found: dict[str, str] = {}
    for phrase in given:
        if len(phrase) > LONGEST_PHRASE:
            raise wrong(
                "phrases",
                phrase,
                _("A phrase may have {most} characters.").format(most=LONGEST_PHRASE),
                code="value_too_long",
            )
        if key := spoken(phrase):
            found.setdefault(key, phrase)
    if not found:
        if given:
            raise wrong("phrases", given[0], _("No phrase has a letter or a digit."))
        if only:
            raise wrong("phrases_only", "true", _("Give phrases too."))
        return None
    return PhraseHelp(tuple(found.values()), weight, only, threshold)


def wrong(name: str, value: Any, hint: str, *, code: str = "invalid_value") -> ServiceError:
    return ServiceError(400, code, _("{name} is {value}.").format(name=name, value=shown(value)), hint, param=name)


def shown(value: Any) -> str:
    """A value in a message: one line, printable, short."""
    found = str(value)
    found = ascii(found[:SHOWN]) if not found.isprintable() else repr(found[:SHOWN])
    return found if len(str(value)) <= SHOWN else found + "…"
