"""Writes docs/reference.md from the settings and the command line: python docs/generate_reference.py"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["RESONANCE_LANG"] = "en"  # before any text is looked up

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from resonance import cli, cli_data, cli_sagemaker, cli_token, passthrough
from resonance.config import CurveConfig, TrainConfig
from resonance.config_export import ExportConfig
from resonance.config_help import description, expected
from resonance.config_plan import PlanConfig
from resonance.config_recognizer import EvaluateConfig, TranscribeConfig
from resonance.config_sagemaker import SubmitConfig
from resonance.config_serve import ServeConfig
from resonance.config_types import Switch

PAGE = Path(__file__).with_name("reference.md")

HEAD = """# Reference

Written by `python docs/generate_reference.py` from the settings themselves. Do not edit.

Settings are given as `--name value` or `--name=value`; `-` and `_` are the same in names. A true-or-false setting is
switched on by its bare name. `--config FILE` reads the same names from a YAML file; later files win over earlier ones,
and the command line wins over files. All mistakes are told at once, before anything is loaded.
"""

TAIL = """
## Files of a run

| file | what it is |
|---|---|
| `adapter/` | the result of `lora`: everything but the model it was made from; copy the whole folder |
| `model/` | the result of `full` and `frozen_encoder`: a whole Whisper model |
| `config.yaml` | every setting of the run, also those left out |
| `data/train.json`, `data/held_out.json` | the recordings that were trained on and those kept out |
| `data/stream.json` | in place of `data/train.json` where the data was streamed: what it was, and a mark by which it is known again |
| `data/clips/` | recordings out of a stream: those held out, and a sample that the audio context was fitted with |
| `events.jsonl` | one JSON object for each row of the log: step, loss, learning rate, error rates, memory … |
| `runs/` | the same for TensorBoard: `tensorboard --logdir RUN/runs` |
| `checkpoints/` | where `--resume` goes on |
| `hf/`, `ctranslate2/`, `ggml/` | written by `resonance export`; `export.json` in them says what they were made from and how near their texts are |
| `report.html`, `report.json` | written by `resonance evaluate` |

## Exit codes

| code | meaning |
|---|---|
| 0 | all is well; of `resonance serve`: it was told to stop, and all that was under way was answered |
| 1 | recordings, a model or the machine are at fault, or something was found that would be lost |
| 2 | the command line or a configuration file is at fault |
| 130, 143 | stopped by Ctrl-C, or by the system; what can be saved has been saved |

## Environment variables

| variable | meaning |
|---|---|
| `RESONANCE_LANG` | language of the messages: `en`, `zh-CN` or `zh-TW`; left out, the one of the system |
| `RESONANCE_HOME` | folder for the tokens of the service and for what plans learn from trainings; left out, the user's own |
| `HF_ENDPOINT` | another address of the model hub, such as a mirror |
| `HF_HUB_OFFLINE=1` | never ask the model hub; only what is on this machine is used |
| `HF_HOME` | where downloaded models are kept |
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for model, name in (
        (TrainConfig, "train"),
        (EvaluateConfig, "evaluate"),
        (TranscribeConfig, "transcribe"),
        (ServeConfig, "serve"),
        (ExportConfig, "export"),
    ):
        parts += settings(model, f"resonance {name}")
    parts += settings(PlanConfig, "resonance plan", beside=TrainConfig)
    parts += settings(CurveConfig, "resonance curve", beside=TrainConfig)
    parts += settings(SubmitConfig, "resonance sagemaker submit", beside=TrainConfig)
    parts += training_arguments()
    for name, command in cli_data.COMMANDS.items():
        parts += flags(f"resonance data {name}", command)
    for name in ("status", "logs", "download"):
        parts += flags(f"resonance sagemaker {name}", cli_sagemaker.COMMANDS[name])
    for name, command in cli_token.COMMANDS.items():
        parts += flags(f"resonance token {name}", command)
    parts += flags("resonance demo", cli.demo)
    parts += flags("resonance doctor", cli.doctor)
    return "\n".join(parts) + TAIL


def settings(model: type[BaseModel], command: str, beside: type[BaseModel] | None = None) -> Iterator[str]:
    """The settings of one command, by group; of a command that takes all of `beside` too, those that differ."""
    yield f"## {command}\n"
    yield " ".join((model.__doc__ or "").split()) + "\n"
    groups: dict[str, str] = getattr(model, "groups", {})
    fields = model.model_fields
    if beside:
        fields = {name: field for name, field in fields.items() if repr(field) != repr(beside.model_fields.get(name))}
        yield "| setting | takes | default | meaning |\n|---|---|---|---|"
    for name, field in fields.items():
        if name == "extra":
            continue
        if name in groups and not beside:
            yield f"\n### {groups[name]}\n\n| setting | takes | default | meaning |\n|---|---|---|---|"
        others = "".join(f"<br>{other}" for other in other_names(model, name))
        default = "needed" if field.is_required() else shown(field.default)
        yield row(f"`--{name}`{others}", expected(field), default, description(field))
    yield ""


def other_names(model: type[BaseModel], name: str) -> Iterator[str]:
    aliases: dict[str, str | Switch] = getattr(model, "aliases", {})
    for alias, meaning in aliases.items():
        if meaning == name:
            yield f"`--{alias}`"
        elif isinstance(meaning, Switch) and meaning.setting == name:
            yield f"`--{alias}` for {meaning.value}"


def training_arguments() -> Iterator[str]:
    """What becomes of the settings of transformers that Resonance has no name of its own for."""
    known = set(passthrough.arguments()) - TrainConfig.model_fields.keys() - TrainConfig.aliases.keys()
    fixed = passthrough.owned()
    yield "## Further settings of `resonance train`\n"
    yield (
        "These settings of transformers' [Seq2SeqTrainingArguments]"
        "(https://huggingface.co/docs/transformers/main_classes/trainer#transformers.Seq2SeqTrainingArguments) "
        "are passed on as they are:\n"
    )
    yield ", ".join(f"`{name}`" for name in sorted(known - fixed.keys())) + "\n"
    yield "These are set by Resonance itself:\n\n| setting | why |\n|---|---|"
    yield from (row(f"`{name}`", reason) for name, (_accepted, reason) in sorted(fixed.items()))
    yield "\nThese are of older versions of transformers:\n\n| setting | instead |\n|---|---|"
    yield from (row(f"`{name}`", text) for name, text in sorted(passthrough.removed().items()))
    yield ""


class _Found(Exception):  # noqa: N818 - carries the parser out of a command
    pass


def flags(name: str, command: Callable[[list[str]], int]) -> Iterator[str]:
    """The flags of a command that has its own parser."""
    parser = parser_of(command)
    yield f"## {name}\n\n{parser.description}\n\n| argument | default | meaning |\n|---|---|---|"
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        title = action.option_strings[0] if action.option_strings else (action.metavar or action.dest)
        choices = f" ({', '.join(action.choices)})" if action.choices else ""
        default = "needed" if action.required else shown(action.default)
        yield row(f"`{title}`", default, f"{action.help or ''}{choices}".strip())
    yield ""


def parser_of(command: Callable[[list[str]], int]) -> argparse.ArgumentParser:
    def parse_args(self: argparse.ArgumentParser, *args: Any) -> None:
        raise _Found(self)

    original = cli_data.Parser.parse_args
    cli_data.Parser.parse_args = parse_args  # type: ignore[method-assign,assignment]
    try:
        command([])
    except _Found as found:
        parser: argparse.ArgumentParser = found.args[0]
        return parser
    finally:
        cli_data.Parser.parse_args = original  # type: ignore[method-assign]
    raise RuntimeError(f"{command} has no parser")


def shown(value: Any) -> str:
    if value is None or value is PydanticUndefined:
        return ""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    return (
        f"`{value:g}`" if isinstance(value, float) else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    )


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
