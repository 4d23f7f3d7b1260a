"""`resonance sagemaker …`: trainings on rented machines of Amazon."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from resonance.cli_data import Parser
from resonance.config_io import parse
from resonance.config_sagemaker import SubmitConfig
from resonance.messages import _


def submit(argv: list[str]) -> int:
    config = parse(SubmitConfig, argv, "resonance sagemaker submit")
    from resonance.launch import sagemaker

    name = sagemaker.submit(config, _say)
    if config.dry_run:
        return 0
    _say(_("Started: {name}. Next:").format(name=name))
    region = f" --region {shlex.quote(config.region)}" if config.region else ""
    for command in (f"status {name}", f"logs {name} --follow", f"download {name} --output_dir runs/{name}"):
        _say(f"  resonance sagemaker {command}{region}")
    return sagemaker.wait(name, config.region, _say) if config.wait else 0


def status(argv: list[str]) -> int:
    args = _parser("status", _("How far a job is, what it cost so far, and why it failed.")).parse_args(argv)
    from resonance.launch import sagemaker

    for line in sagemaker.describe(sagemaker.find(args.name, args.region)):
        _say(line)
    return 0


def logs(argv: list[str]) -> int:
    parser = _parser("logs", _("What a job printed."))
    parser.add_argument("--follow", action="store_true", help=_("go on until the job has ended"))
    args = parser.parse_args(argv)
    from resonance.launch import sagemaker

    if args.follow:
        return sagemaker.wait(args.name, args.region, _say)
    sagemaker.show_log(sagemaker.find(args.name, args.region), args.region, follow=False, say=_say)
    return 0


def download(argv: list[str]) -> int:
    parser = _parser("download", _("Fetch the result of a job from S3."))
    parser.add_argument("--output_dir", type=Path, required=True, help=_("folder for it; must not exist yet"))
    args = parser.parse_args(argv)
    from resonance.launch import sagemaker

    folder = sagemaker.download(args.name, args.output_dir, args.region)
    _say(_("The result is in {folder}. Next:").format(folder=folder))
    _say(f"  resonance transcribe --model_path {shlex.quote(str(args.output_dir))} --audio_path recording.wav")
    return 0


def _parser(name: str, description: str) -> Parser:
    parser = Parser(f"resonance sagemaker {name}", description)
    parser.add_argument("name", metavar="NAME", help=_("name of the job"))
    parser.add_argument("--region", help=_("AWS region; left out, the one of your AWS settings"))
    return parser


def _say(text: str) -> None:
    print(text, flush=True)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "submit": submit,
    "status": status,
    "logs": logs,
    "download": download,
}
