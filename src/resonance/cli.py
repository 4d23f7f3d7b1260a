"""The command line. Each sub-command parses, calls one function and returns an exit code; the work is done elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from resonance import __version__
from resonance.config import EvaluateConfig, TrainConfig, TranscribeConfig
from resonance.config_io import parse
from resonance.errors import ConfigError, ResonanceError
from resonance.messages import _

Command = Callable[[list[str]], int]


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. Errors of ours become one message on stderr."""
    try:
        return dispatch(argv)
    except ResonanceError as error:
        return report_error(error)
    except KeyboardInterrupt:
        print(_("Stopped."), file=sys.stderr)
        return 130
    except BrokenPipeError:  # `resonance … | head`
        return 141


def report_error(error: ResonanceError) -> int:
    print(_("Error: {message}").format(message=error), file=sys.stderr)
    return error.exit_code


def dispatch(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("-V", "--version"):
        print(f"resonance {__version__}")
        return 0
    if name == "data":
        return data(rest)
    if name not in COMMANDS:
        raise ConfigError([unknown(name, COMMANDS)])
    return COMMANDS[name](rest)


def unknown(name: str, known: Sequence[str] | dict[str, Command]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), 1)
    text = _("{name} is not a command.").format(name=name)
    return f"{text} " + (
        _("Did you mean {near}?").format(near=near[0])
        if near
        else _("Commands: {names}.").format(names=", ".join(known))
    )


def overview() -> str:
    rows = [
        ("train", _("fine-tune Whisper on recordings and their transcripts")),
        ("evaluate", _("compare the result with the model it was made from, on held-out recordings")),
        ("transcribe", _("turn recordings into text")),
        ("data check", _("find recordings and transcripts that would spoil a training")),
        ("data convert", _("any audio or video to 16 kHz mono WAV")),
        ("data split", _("divide recordings into training and validation")),
        ("doctor", _("what is installed, what this machine can do, what to install for more")),
    ]
    lines = [_("Resonance fine-tunes Whisper on your own recordings and puts the result to work."), ""]
    lines += [f"  resonance {name:<13} {text}" for name, text in rows]
    lines += ["", _("`resonance COMMAND --help` explains a command.")]
    return "\n".join(lines)


def train(argv: list[str]) -> int:
    config = parse(TrainConfig, with_saved_settings(argv), "resonance train")
    from rich.console import Console

    from resonance.finetune import finetune

    console = Console()
    folder = finetune(config, console)
    console.print(_("The result is in {folder}. Next:").format(folder=folder), highlight=False, soft_wrap=True)
    for command in (
        f"resonance evaluate --model_path {config.output_dir}",
        f"resonance transcribe --model_path {config.output_dir} --audio_path recording.wav",
    ):
        console.print(f"  {command}", highlight=False, soft_wrap=True)
    return 0


def with_saved_settings(argv: list[str]) -> list[str]:
    """`--resume --output_dir RUN` alone takes the other settings from RUN/config.yaml."""
    flags = [a.replace("-", "_").lstrip("_") for a in argv]
    if "resume" not in flags and "resume=true" not in (f.lower() for f in flags):
        return argv
    for i, flag in enumerate(flags):
        _name, _equals, value = argv[i].partition("=")
        if flag.startswith("output_dir"):
            folder = value or (argv[i + 1] if i + 1 < len(argv) else "")
            saved = Path(folder) / "config.yaml"
            return ["--config", str(saved), *argv] if folder and saved.is_file() else argv
    return argv


def evaluate(argv: list[str]) -> int:
    config = parse(EvaluateConfig, argv, "resonance evaluate")
    from rich.console import Console

    from resonance.evaluate.evaluation import evaluate
    from resonance.evaluate.results import format_table, lead_sentence, verdict

    console = Console()
    report, folder = evaluate(config, console)
    console.print(format_table(report))
    for group in report.groups:
        console.print(lead_sentence(group), highlight=False, soft_wrap=True)
    console.print(verdict(report.groups[0])[1], highlight=False, soft_wrap=True)
    console.print(_("Report: {path}").format(path=folder / "report.html"), highlight=False, soft_wrap=True)
    return 0


def transcribe(argv: list[str]) -> int:
    config = parse(TranscribeConfig, argv, "resonance transcribe")
    from resonance.transcribe.output import transcribe_to_output

    return transcribe_to_output(config)


def data(argv: list[str]) -> int:
    from resonance import cli_data

    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_("Commands: {names}.").format(names=", ".join(f"resonance data {n}" for n in cli_data.COMMANDS)))
        return 0
    if name not in cli_data.COMMANDS:
        raise ConfigError([unknown(name, cli_data.COMMANDS)])
    return cli_data.COMMANDS[name](rest)


def doctor(argv: list[str]) -> int:
    from resonance.cli_data import Parser

    parser = Parser("resonance doctor", _("Show what this installation can do."))
    parser.add_argument("--hub", action="store_true", help=_("try to reach the model hub"))
    args = parser.parse_args(argv)
    from resonance.doctor import print_report

    return print_report(ask_hub=args.hub)


COMMANDS: dict[str, Command] = {
    "train": train,
    "evaluate": evaluate,
    "transcribe": transcribe,
    "doctor": doctor,
}
