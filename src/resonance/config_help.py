"""What a setting takes, in words, and the help page of a command made of them."""

from __future__ import annotations

import types
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from resonance.config_types import ADDRESS, Switch
from resonance.messages import _

INDENT = 6  # columns before the text under a flag


def alternatives(field: FieldInfo) -> list[tuple[Any, tuple[Any, ...]]]:
    """The types that a setting takes, None left out, each with its bounds: `(int, (Ge(1),))`."""
    return [*_alternatives(field.annotation, tuple(field.metadata))]


def is_optional(field: FieldInfo) -> bool:
    """Whether the setting may be without a value."""
    return type(None) in get_args(field.annotation)


def takes(field: FieldInfo, kind: type) -> bool:
    """Whether one of the setting's types is `kind` (bool, list, …)."""
    return any(kind in (found, get_origin(found)) for found, _bounds in alternatives(field))


def expected(field: FieldInfo) -> str:
    """What the setting takes: "a whole number (at least 1)"."""
    return _(" or ").join(_in_words(kind, bounds) for kind, bounds in alternatives(field))


def description(field: FieldInfo) -> str:
    """The setting's help, in the user's language."""
    return _(" ".join((field.description or "").split()))


def help_page(model: type[BaseModel], prog: str, width: int = 80) -> str:
    """Usage, every setting with its help, choices, bounds and default, by group. At most `width` columns wide."""
    required = [f"--{n} {_metavar(f)}" for n, f in model.model_fields.items() if f.is_required()]
    usage = _("Usage: {command} [--SETTING VALUE ...]").format(command=" ".join([prog, *required]))
    lines = [*_wrapped(usage, width, hang=4), ""]
    for paragraph in (model.__doc__ or "").split("\n\n"):
        lines += [*_wrapped(_(" ".join(paragraph.split())), width), ""]
    lines += [f"  --config {_('FILE')}"]
    text = _("Take settings from a YAML file. May be given several times: later files win, and flags win over files.")
    lines += _wrapped(text, width, indent=INDENT)
    lines += ["  -h, --help", *_wrapped(_("Print this page."), width, indent=INDENT)]
    groups: dict[str, str] = getattr(model, "groups", {})
    for name, field in model.model_fields.items():
        if name == "extra":  # set by its members' names
            continue
        if name in groups:
            lines += ["", _(groups[name])]
        lines += [f"  --{name} {_metavar(field)}".rstrip()]
        lines += _wrapped(f"{description(field)} {_notes(model, name, field)}".strip(), width, indent=INDENT)
    return "\n".join(lines) + "\n"


def _alternatives(annotation: Any, bounds: tuple[Any, ...]) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        found = [b for m in metadata for b in (m.metadata if isinstance(m, FieldInfo) else [m])]
        yield from _alternatives(inner, (*bounds, *found))
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            if part is not type(None):
                yield from _alternatives(part, bounds)
    else:
        yield annotation, bounds


def _in_words(kind: Any, bounds: tuple[Any, ...]) -> str:
    if get_origin(kind) is Literal:
        return _("one of {choices}").format(choices=", ".join(get_args(kind)))
    inner = next(_alternatives(get_args(kind)[0], ())) if get_origin(kind) is list else (None, ())
    if inner[0] is int:
        words = _("whole numbers separated by commas")
        return f"{words} ({limits})" if (limits := _limits(inner[1])) else words
    if ADDRESS in bounds:
        return _("an address such as s3://bucket/folder")
    if get_origin(inner[0]) is Literal:
        return _("one or several of {choices}, separated by commas").format(choices=", ".join(get_args(inner[0])))
    names = {
        bool: _("true or false"),
        int: _("a whole number"),
        float: _("a number"),
        str: _("text"),
        Path: _("the path of a file or folder"),
        list: _("a list separated by commas"),
    }
    words = names[get_origin(kind) or kind]
    limits = _limits(bounds)
    return f"{words} ({limits})" if limits else words


def _limits(bounds: tuple[Any, ...]) -> str:
    texts = {"ge": _("at least {n}"), "gt": _("more than {n}"), "le": _("at most {n}"), "lt": _("less than {n}")}
    found = [texts[side].format(n=_shown(getattr(b, side))) for b in bounds for side in texts if hasattr(b, side)]
    return ", ".join(found)


def _metavar(field: FieldInfo) -> str:
    names = {int: _("NUMBER"), float: _("NUMBER"), str: _("TEXT"), Path: _("PATH"), list: _("A,B,...")}
    parts: list[str] = []
    for kind, bounds in alternatives(field):
        if get_origin(kind) is Literal:
            parts += get_args(kind)
        elif kind is bool:
            parts.append("[true|false]")
        elif ADDRESS in bounds:
            parts.append(_("ADDRESS"))
        else:
            parts.append(names[get_origin(kind) or kind])
    return "|".join(parts)


def _notes(model: type[BaseModel], name: str, field: FieldInfo) -> str:
    """Default, bounds and other names, in brackets. "at least 1" alone goes without saying."""
    notes = []
    if field.is_required():
        notes.append(_("required"))
    elif field.default is not None and field.default is not PydanticUndefined:
        notes.append(_("default: {value}").format(value=_shown(field.default)))
    notes += [_limits(bounds) for _kind, bounds in alternatives(field) if any(isinstance(b, (Le, Lt)) for b in bounds)]
    aliases: dict[str, str | Switch] = getattr(model, "aliases", {})
    for alias, meaning in aliases.items():
        if meaning == name:
            notes.append(_("also --{name}").format(name=alias))
        elif isinstance(meaning, Switch) and meaning.setting == name:
            notes.append(_("--{name} means {value}").format(name=alias, value=meaning.value))
    return f"({'; '.join(notes)})" if notes else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _columns(text: str) -> int:
    """Columns of a terminal: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _wrapped(text: str, width: int, indent: int = 0, hang: int = 0) -> list[str]:
    """`text` in lines of `width` columns, broken at spaces and between wide characters."""
    pieces: list[str] = []
    for character in text:
        wide = _columns(character) == 2
        if not pieces or wide or pieces[-1][-1] == " " or _columns(pieces[-1][-1]) == 2:
            # A closing mark must not begin a line, nor an opening one end it.
            closing = unicodedata.category(character) in ("Po", "Pe", "Pf")
            if pieces and (closing or unicodedata.category(pieces[-1][-1]) in ("Ps", "Pi")):
                pieces[-1] += character
            else:
                pieces.append(character)
        else:
            pieces[-1] += character
    lines, line = [], " " * indent
    for piece in pieces:
        if _columns(line + piece.rstrip()) > width and line.strip():
            lines.append(line.rstrip())
            line = " " * (indent + hang)
        line += piece
    return [*lines, line.rstrip()]
