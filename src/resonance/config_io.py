"""Settings from YAML files, flags and mappings of texts to one checked model, and back to YAML.

Every door gives names and texts. Layers (defaults < YAML files < flags) are merged as such and checked once, so that the
same mistake gets the same message everywhere, and all mistakes are told at once.
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from resonance import passthrough
from resonance.config_help import description, expected, help_page, is_optional, takes
from resonance.config_types import Switch
from resonance.config_yaml import read_yaml, write_yaml
from resonance.errors import ConfigError, RunFolderError
from resonance.messages import _
from resonance.passthrough import FALSE_WORDS, NONE_WORDS, TRUE_WORDS

LONGEST_VALUE_SHOWN = 80  # characters

Config = TypeVar("Config", bound=BaseModel)


@dataclass(frozen=True)
class Given:
    """A value that somebody gave to a setting."""

    value: Any  # text, None, or a list or dict of such
    shown: str  # the name as it was typed: "--fp16"
    where: str  # "command line", "run.yaml, line 3"
    quoted: bool = False  # a text that is meant as text, even if it says none


@dataclass
class Merged:
    """What all layers together say, and what was wrong with it."""

    settings: dict[str, Given] = field(default_factory=dict)
    extra: dict[str, Given] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


Layer = Sequence[tuple[str, Given]]  # names with underscores


def parse(model: type[Config], argv: Sequence[str], prog: str) -> Config:
    """The settings on a command line (`--name value`, `--name=value`, bare `--name` for true) and in its `--config` files.

    Prints the help and leaves (SystemExit 0) where `-h` or `--help` is given. Raises ConfigError with every problem.
    """
    if "-h" in argv or "--help" in argv:
        columns = shutil.get_terminal_size().columns
        print(help_page(model, prog, width=max(40, min(columns, 100))), end="")
        raise SystemExit(0)
    files, flags, problems = _read_flags(model, argv)
    layers = []
    for file in files:
        try:
            layers.append(_yaml_layer(file))
        except ConfigError as error:
            problems += error.problems
    if len(layers) < len(files):  # what else is wrong or missing depends on the files
        raise ConfigError(problems)
    return _build(model, [*layers, flags], problems)


def from_mapping(model: type[Config], values: Mapping[str, Any], where: str | None = None) -> Config:
    """The settings in `values`, as a web form or a SageMaker job gives them: all may be text. Raises ConfigError."""
    source = where or _("settings")
    layer = [(str(name).replace("-", "_"), Given(_as_text(v), str(name), source)) for name, v in values.items()]
    return _build(model, [layer], [])


def load_yaml(model: type[Config], path: Path) -> Config:
    """The settings in one YAML file, such as a run's `config.yaml`. Raises ConfigError."""
    return _build(model, [_yaml_layer(path)], [])


def dump_yaml(config: BaseModel, path: Path) -> None:
    """Write all settings, defaults too, so that `load_yaml` gives an equal config. Complete or not at all.

    Raises RunFolderError where the file cannot be written.
    """
    values = config.model_dump(mode="json")
    values |= values.pop("extra", {})
    write_settings(values, path)


def write_settings(values: Mapping[str, Any], path: Path) -> None:
    """Write settings as a YAML file for --config. Raises RunFolderError where it cannot be written."""
    try:
        write_yaml(values, path)
    except OSError as error:
        raise RunFolderError(
            _("{path}: cannot be written ({reason}). Choose another folder or free some space.").format(
                path=path, reason=error.strerror or error
            )
        ) from error


def _yaml_layer(path: Path) -> Layer:
    return [
        (
            entry.name.replace("-", "_"),
            Given(entry.value, entry.name, _("{path}, line {line}").format(path=path, line=entry.line), entry.quoted),
        )
        for entry in read_yaml(path)
    ]


def _as_text(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_text(item) for item in value]
    return value if value is None or isinstance(value, dict) else str(value)


def _read_flags(model: type[BaseModel], argv: Sequence[str]) -> tuple[list[Path], Layer, list[str]]:
    """Files of `--config`, the flags with their values, and what is neither."""
    where = _("command line")
    files: list[Path] = []
    flags: dict[str, Given] = {}  # the last of several wins, so that a script's flags can be followed by others
    problems = []
    position = 0
    while position < len(argv):
        flag, equals, text = argv[position].partition("=")
        position += 1
        if not flag.startswith("--") or flag == "--":
            problems.append(
                _(
                    "{where}: {text} belongs to no setting. Settings are given as --name value; "
                    "put quotes around a value with spaces."
                ).format(where=where, text=repr(argv[position - 1]))
            )
            continue
        name = flag[2:].replace("-", "_")
        values = [text] if equals else []
        room = 0 if equals else len(argv) if _takes_several(model, name) else 1
        while len(values) < room and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        if name == "config":
            if values and values[0]:
                files.append(Path(values[0]))
            else:
                problems.append(_("{where}: --config needs the path of a YAML file.").format(where=where))
        elif values or _takes_nothing(model, name):
            value: Any = values if len(values) > 1 else values[0] if values else "true"
            flags.pop(name, None)
            flags[name] = Given(value, flag, where)
        elif name in _names(model):
            problems.append(
                _("{where}: {flag} needs a value: {expected}.").format(
                    where=where, flag=flag, expected=expected(model.model_fields[_setting(model, name)])
                )
            )
        else:
            flags[name] = Given("", flag, where)
    return files, list(flags.items()), problems


def _aliases(model: type[BaseModel]) -> Mapping[str, str | Switch]:
    aliases: Mapping[str, str | Switch] = getattr(model, "aliases", {})
    return aliases


def _names(model: type[BaseModel]) -> list[str]:
    return [name for name in (*model.model_fields, *_aliases(model)) if name != "extra"]


def _setting(model: type[BaseModel], name: str) -> str:
    """The setting that `name`, a setting or another name for one, stands for."""
    meaning = _aliases(model).get(name, name)
    return meaning.setting if isinstance(meaning, Switch) else meaning


def _takes_nothing(model: type[BaseModel], name: str) -> bool:
    """Whether the bare flag means true."""
    if isinstance(_aliases(model).get(name), Switch):
        return True
    if name in _names(model):
        return takes(model.model_fields[_setting(model, name)], bool)
    return _is_extra(model, name) and passthrough.takes_bool(name)


def _takes_several(model: type[BaseModel], name: str) -> bool:
    return name in _names(model) and takes(model.model_fields[_setting(model, name)], list)


def _is_extra(model: type[BaseModel], name: str) -> bool:
    return "extra" in model.model_fields and name not in _names(model) and passthrough.is_known(name)


def _build(model: type[Config], layers: Iterable[Layer], problems: Sequence[str]) -> Config:
    merged = Merged(problems=list(problems))
    for layer in layers:
        _merge(model, merged, layer)
    values: dict[str, Any] = {}
    bad: set[str] = set()
    for name, given in merged.settings.items():
        try:
            values[name] = _prepared(model, name, given)
        except ValueError as error:
            merged.problems.append(str(error))
            bad.add(name)
    if merged.extra:
        values["extra"] = {name: given.value for name, given in merged.extra.items()}
    config = _validated(model, values, merged, bad)
    if config is None or merged.problems:
        raise ConfigError(list(dict.fromkeys(merged.problems)))
    return config


def _merge(model: type[BaseModel], merged: Merged, layer: Layer) -> None:
    """Lay `layer` over what is there. Names of one layer that contradict each other are problems."""
    here: dict[str, Given] = {}
    denials: list[tuple[Switch, Given]] = []
    for name, given in _flat(model, layer):
        meaning = _aliases(model).get(name, name)
        if isinstance(meaning, Switch):
            word = str(given.value).lower()
            if word in TRUE_WORDS:
                _give(merged, here, meaning.setting, replace(given, value=meaning.value))
            elif word in FALSE_WORDS:
                denials.append((meaning, given))
            else:
                help_text = description(model.model_fields[meaning.setting])
                merged.problems.append(
                    _("{where}: {name} is {value}. It must be true or false. For {setting}: {help}").format(
                        where=given.where,
                        name=given.shown,
                        value=_short(given.value),
                        setting=meaning.setting,
                        help=help_text,
                    )
                )
        elif meaning in _names(model):
            _give(merged, here, meaning, given)
        elif _is_extra(model, meaning):
            merged.extra[meaning] = given
        else:
            merged.problems.append(_unknown(model, meaning, given))
    for switch, given in denials:
        if switch.setting in here and here[switch.setting].value == switch.value:
            merged.problems.append(_contradiction(here[switch.setting], given))
        current = here.get(switch.setting) or merged.settings.get(switch.setting)
        if current is None or current.value in (switch.value, "auto"):
            here[switch.setting] = replace(given, value=switch.otherwise)
    merged.settings |= here


def _flat(model: type[BaseModel], layer: Layer) -> Layer:
    """The layer with the members of `extra` among the others: one place to look for a name."""
    if "extra" not in model.model_fields:
        return layer
    flat: list[tuple[str, Given]] = []
    for name, given in layer:
        if name == "extra" and isinstance(given.value, dict):
            flat += [(str(key), replace(given, value=value, shown=str(key))) for key, value in given.value.items()]
        else:
            flat.append((name, given))
    return flat


def _give(merged: Merged, here: dict[str, Given], setting: str, given: Given) -> None:
    if setting in here and here[setting].value != given.value:
        merged.problems.append(_contradiction(here[setting], given))
    here[setting] = given


def _contradiction(one: Given, other: Given) -> str:
    return _("{where}: {one} and {other} contradict each other. Keep one of them.").format(
        where=other.where, one=one.shown, other=other.shown
    )


def _unknown(model: type[BaseModel], name: str, given: Given) -> str:
    text = _("{where}: {name} is not a setting.").format(where=given.where, name=given.shown)
    near = _nearest(model, name)
    if near is None:
        return text + " " + _("--help lists all settings.")
    prefix = "--" if given.shown.startswith("--") else ""
    return text + " " + _("Did you mean {name}?").format(name=prefix + near)


def _nearest(model: type[BaseModel], name: str) -> str | None:
    own = _names(model)
    if len(name) > 3 and (holding := next((known for known in own if name in known), None)):
        return holding  # epochs: num_train_epochs
    further = passthrough.arguments() if "extra" in model.model_fields else ()
    near = difflib.get_close_matches(name, [*own, *further], 1)
    return near[0] if near else None


def _prepared(model: type[BaseModel], name: str, given: Given) -> Any:
    """The value in the shape the setting takes: none as None, commas as a list. Raises ValueError with the message."""
    info, value = model.model_fields[name], given.value
    if isinstance(value, str) and is_optional(info) and not given.quoted and value.lower() in NONE_WORDS:
        return None
    if value == "" or (value is None and not is_optional(info)):
        raise ValueError(
            _("{where}: {name} is empty. It must be {expected}.").format(
                where=given.where, name=given.shown, expected=expected(info)
            )
        )
    if isinstance(value, str) and takes(info, list):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _validated(model: type[Config], values: dict[str, Any], merged: Merged, bad: set[str]) -> Config | None:
    """The model, or None with its problems added: those of single settings, then those between the good ones."""
    required = [name for name, info in model.model_fields.items() if info.is_required()]
    for name in required:
        if name not in values and name not in bad:
            help_text = description(model.model_fields[name])
            merged.problems.append(_("--{name} is needed. {help}").format(name=name, help=help_text))
    while True:
        stand_ins = {name: "." for name in required if name not in values}
        try:
            return model.model_validate(values | stand_ins)
        except ValidationError as error:
            # A default that depends on a wrong setting is not a second mistake.
            found = [
                e
                for e in error.errors(include_url=False)
                if e["type"] != "default_factory_not_called" and not {*e["loc"][:1]} & stand_ins.keys()
            ]
        single = {str(details["loc"][0]): details for details in reversed(found) if details["loc"]}
        for name in model.model_fields:
            if name in single:
                merged.problems += _explained(model, merged, single[name], name)
                del values[name]
                bad.add(name)
        if not single:
            for names, message in found[0]["ctx"]["problems"] if found else ():
                if not bad & set(names):
                    merged.problems.append(_with_sources(merged, names, message))
            return None


def _explained(model: type[BaseModel], merged: Merged, details: ErrorDetails, name: str) -> list[str]:
    if details["type"] == "disagreement":  # members of `extra`
        return [
            _("{where}: {name} is {value}. {message}").format(
                where=merged.extra[key].where,
                name=merged.extra[key].shown,
                value=_short(merged.extra[key].value),
                message=message,
            )
            for (key,), message in details["ctx"]["problems"]
        ]
    given = merged.settings[name]
    if details["type"] == "value_error":
        message = str(details["ctx"]["error"])
    else:
        message = _("It must be {expected}.").format(expected=expected(model.model_fields[name]))
    return [
        _("{where}: {name} is {value}. {message}").format(
            where=given.where, name=given.shown, value=_short(given.value), message=message
        )
    ]


def _with_sources(merged: Merged, names: Sequence[str], message: str) -> str:
    sources = [f"{g.shown}: {g.where}" for n in names if (g := merged.settings.get(n))]
    return f"{message} ({'; '.join(sources)})" if sources else message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE_SHOWN else text[: LONGEST_VALUE_SHOWN - 1] + "…"
