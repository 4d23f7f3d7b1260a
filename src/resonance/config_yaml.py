"""Settings in YAML files: read with the line of each setting, written whole or not at all.

Values stay the text that was typed, and the setting's own type decides what it means. YAML's own rules would turn
`eval_strategy: no` into False, `language: no` (Norwegian) into False and `learning_rate: 3e-4` into text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resonance.errors import ConfigError
from resonance.messages import _


@dataclass(frozen=True)
class Entry:
    """One setting of a file: text, None, a list of texts or, for the mappings of `extra`, a dict with typed values."""

    name: str
    value: Any
    line: int
    quoted: bool


def read_yaml(path: Path) -> list[Entry]:
    """The settings in the file, in its order. Raises ConfigError with every problem, each with its line."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError([_("{path}: cannot be read ({reason}).").format(path=path, reason=reason)]) from None
    except UnicodeDecodeError:
        raise ConfigError([_("{path}: is not UTF-8 text. Save the file as UTF-8.").format(path=path)]) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ConfigError([_("{path}: has an alias (*name). Write the value out.").format(path=path)])
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_broken(path, error)]) from None
    except yaml.YAMLError as error:  # characters that no YAML file may have
        raise ConfigError([_("{path}: is not YAML ({reason}).").format(path=path, reason=error)]) from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError([_("{path}: holds no settings. Write one a line, as name: value.").format(path=path)])
    _refuse_duplicates(path, root)
    return [Entry(key.value, _value(node), key.start_mark.line + 1, _is_quoted(node)) for key, node in root.value]


def write_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Write `values` so that `read_yaml`, and any other YAML reader, gives them back. Raises OSError."""
    text = yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class _Dumper(yaml.SafeDumper):
    """Quotes every text, so that none of it can be taken for a number, a date, yes or none."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')


def _settings(dumper: yaml.SafeDumper, values: dict[str, Any]) -> yaml.MappingNode:
    pairs = [(yaml.ScalarNode("tag:yaml.org,2002:str", k), dumper.represent_data(v)) for k, v in values.items()]
    return yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False)


_Dumper.add_representer(str, _quoted)
_Dumper.add_representer(dict, _settings)


def _broken(path: Path, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    if error.problem and "'\\t'" in error.problem:
        problem = _("a tab, which YAML does not take. Indent and separate with spaces.")
    else:
        problem = _("not YAML ({reason}). Write one setting a line, as name: value.").format(
            reason=error.problem or error.context
        )
    return _("{path}, line {line}, column {column}: {problem}").format(
        path=path, line=line, column=column, problem=problem
    )


def _refuse_duplicates(path: Path, root: yaml.MappingNode) -> None:
    first: dict[str, int] = {}
    problems = []
    for key, _node in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            problems.append(_("{path}, line {line}: a setting's name must be one word.").format(path=path, line=line))
        elif key.value in first:
            problems.append(
                _("{path}, line {line}: {name} is already set in line {first}. Keep one of them.").format(
                    path=path, line=line, name=key.value, first=first[key.value]
                )
            )
        else:
            first[key.value] = line
    if problems:
        raise ConfigError(problems)


def _is_quoted(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is not None


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in ("", "~", "null", "Null", "NULL")


def _value(node: yaml.Node) -> Any:
    if _is_null(node):
        return None
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key.value: _typed(value) for key, value in node.value}
    return str(node.value)


def _typed(node: yaml.Node) -> Any:
    """A value inside a mapping, which no setting's type describes: plain numbers, true and false are what JSON says."""
    if isinstance(node, yaml.SequenceNode):
        return [_typed(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key.value: _typed(value) for key, value in node.value}
    if _is_null(node):
        return None
    if _is_quoted(node):
        return node.value
    if node.value.lower() in ("true", "false"):
        return node.value.lower() == "true"
    for convert in (int, float):
        try:
            return convert(node.value)
        except ValueError:
            continue
    return node.value
