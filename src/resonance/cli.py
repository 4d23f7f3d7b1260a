"""The command line. Each sub-command parses, calls one function and returns an exit code; the work is done elsewhere."""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from resonance import __version__
from resonance.config import CurveConfig, TrainConfig
from resonance.config_export import ExportConfig
from resonance.config_io import parse
from resonance.config_plan import PlanConfig
from resonance.config_recognizer import EvaluateConfig, TranscribeConfig
from resonance.config_serve import ServeConfig
from resonance.errors import (
    ConfigError,
    ElsewhereError,
    Interrupted,
    LostContactError,
    ResonanceError,
    SmallerSettingsError,
    UnreachableError,
)
from resonance.messages import _
from resonance.passthrough import FALSE_WORDS
from resonance.ranks import FAILURE_FILE, Ranks, ranks

if TYPE_CHECKING:
    from rich.console import Console

Command = Callable[[list[str]], int]
MAY_PASS = (LostContactError, SmallerSettingsError, UnreachableError)  # started again, a training may get over them


def run(argv: list[str]) -> int:
    """Run one command and return its exit code. Errors of ours become one message on stderr."""
    try:
        with stopping_on_sigterm():
            try:
                code = dispatch(argv)
            except SystemExit as end:  # the help was asked for
                code = int(end.code or 0)
            except Exception as error:
                if stopped := interruption(error):
                    raise stopped from None
                raise
            sys.stdout.flush()  # here a broken pipe can be caught
            return code
    except ResonanceError as error:
        return report_error(error)
    except KeyboardInterrupt:
        print(_("Stopped."), file=sys.stderr)
        return 130
    except BrokenPipeError:  # `resonance … | head`
        # Python flushes stdout once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def interruption(error: BaseException) -> Interrupted | KeyboardInterrupt | None:
    """The signal behind this error: Python 3.11 makes a RuntimeError of what comes up while a class is being defined."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, Interrupted | KeyboardInterrupt):
        found = found.__cause__
    return found


def leave(code: int) -> NoReturn:
    """End the process with this exit code.

    One of several does without the rest of Python's clean-up. A thread of gloo may be freeing a tensor just then, which
    takes the interpreter's lock; Python ends such a thread, and C++ the process with SIGABRT (torch 2.13, rarely).
    """
    if not _told_ranks().launched:
        sys.exit(code)
    atexit._run_exitfuncs()  # of W&B, of loaders
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _told_ranks() -> Ranks:
    """`ranks`, for what must work where the variables say nothing sensible: that they do may be the error to report."""
    try:
        return ranks()
    except ConfigError:
        return Ranks()


def report_error(error: ResonanceError) -> int:
    """Say it and return the exit code. Of several processes, the one that has the error says it."""
    mine = _told_ranks()
    text = str(error) if isinstance(error, Interrupted) else _("Error: {message}").format(message=error)
    silent = isinstance(error, ElsewhereError) or (isinstance(error, Interrupted) and not mine.main)
    # Before anything is trained the launcher has more to say about a signal: whether it starts all again.
    if not silent and not (FAILURE_FILE in os.environ and text == _("Stopped.")):
        print(text if mine.main else f"[{mine.rank}] {text}", file=sys.stderr)
    # Who sends a signal to this process knows what comes next: the launcher does so to all before it starts them again.
    may_pass = isinstance(error, MAY_PASS) or (isinstance(error, Interrupted) and error.here)
    if FAILURE_FILE in os.environ and not may_pass:
        Path(os.environ[FAILURE_FILE]).write_text(str(error.exit_code), encoding="utf-8")  # it would happen again
    return error.exit_code


@contextlib.contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does: what is half-written is removed on the way out. A second one kills."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Interrupted(_("Stopped."), number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def plain_console() -> Console:
    """A console that prints paths and transcripts as they are: `[b]` and `:smile:` in them mean nothing."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def dispatch(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name in ("-V", "--version"):
        print(f"resonance {__version__}")
        return 0
    if name in GROUPS:
        return group(name, rest)
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
        ("plan", _("settings that fit this machine; the memory, time and cost of a training")),
        ("train", _("fine-tune Whisper on recordings and their transcripts")),
        ("evaluate", _("compare the result with the model it was made from, on held-out recordings")),
        ("transcribe", _("turn recordings into text")),
        ("serve", _("answer other programs over HTTP, each person with the model of their voice")),
        ("export", _("write the result for other programs: faster-whisper, whisper.cpp, Hugging Face")),
        ("curve", _("train on 10, 30, 50, 100 recordings: would recording more help?")),
        ("demo", _("the whole way on recordings that come with it, offline, in minutes")),
        ("data check", _("find recordings and transcripts that would spoil a training")),
        ("data convert", _("any audio or video to 16 kHz mono WAV")),
        ("data split", _("divide recordings into training and validation")),
        ("data shard", _("recordings into tar files that a large training streams")),
        ("sagemaker", _("train on rented machines of Amazon: submit, status, logs, download")),
        ("token", _("who may use the service: create, list, revoke")),
        ("doctor", _("what is installed, what this machine can do, what to install for more")),
    ]
    lines = [_("Resonance fine-tunes Whisper on your own recordings and puts the result to work."), ""]
    lines += [f"  resonance {name:<13} {text}" for name, text in rows]
    lines += ["", _("`resonance COMMAND --help` explains a command.")]
    return "\n".join(lines)


def train(argv: list[str]) -> int:
    mine = ranks()
    if mine.launched:  # DeepSpeed's launcher adds a flag of its own
        argv = [flag for flag in argv if not flag.startswith(("--local_rank=", "--local-rank="))]
    if mine.restarts:
        if Path(os.environ.get(FAILURE_FILE, "")).is_file():  # of the attempt before
            return int(Path(os.environ[FAILURE_FILE]).read_text(encoding="utf-8"))
        argv = [*argv, "--resume"]
    config = parse(TrainConfig, with_saved_settings(argv), "resonance train")
    console = plain_console()
    # One task of srun on each machine may still have processes to start.
    by_slurm_alone = mine.launched and "RANK" not in os.environ
    starts = by_slurm_alone and config.processes > 1 and mine.world != config.processes
    if config.in_processes and (starts or not mine.launched):
        from resonance.launch.processes import run_processes

        return run_processes(config, argv, console)
    if mine.restarts and mine.main:
        text = _("A process has ended: started again ({count} of {most}), from the last checkpoint.")
        console.print(text.format(count=mine.restarts, most=config.max_restarts), style="yellow", soft_wrap=True)
    from resonance.finetune import finetune
    from resonance.model.runs import RunFolder

    folder = finetune(config, console)
    if not mine.main:
        return 0
    console.print(_("The result is in {folder}. Next:").format(folder=folder), soft_wrap=True)
    run = shlex.quote(str(config.output_dir))
    test = "" if RunFolder(config.output_dir).held_out_rows.exists() else " --test_file labels.json"
    for command in (
        f"resonance evaluate --model_path {run}{test}",
        f"resonance transcribe --model_path {run} --audio_path recording.wav",
    ):
        console.print(f"  {command}", soft_wrap=True)
    return 0


def with_saved_settings(argv: list[str]) -> list[str]:
    """`--resume --output_dir RUN` alone takes the other settings from RUN/config.yaml."""
    given: dict[str, str] = {}
    for i, flag in enumerate(argv):
        if flag.startswith("--"):
            name, equals, value = flag[2:].partition("=")
            after = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else ""
            given[name.replace("-", "_")] = value if equals else after
    resumes = {"resume", "resume_from_checkpoint"} & given.keys()
    if not given.get("output_dir") or all(given[name].lower() in FALSE_WORDS for name in resumes):
        return argv
    saved = Path(given["output_dir"]).expanduser() / "config.yaml"
    if not saved.is_file():
        return argv
    # max_steps wins over num_train_epochs, and the saved settings always have one of the two.
    by_epochs = ["--max_steps=-1"] if "num_train_epochs" in given and "max_steps" not in given else []
    return ["--config", str(saved), *by_epochs, *argv]


def plan(argv: list[str]) -> int:
    config = parse(PlanConfig, argv, "resonance plan")
    from resonance.plan.command import run

    return run(config, plain_console())


def evaluate(argv: list[str]) -> int:
    config = parse(EvaluateConfig, argv, "resonance evaluate")
    from resonance.evaluate.evaluation import evaluate
    from resonance.evaluate.results import format_table, lead_sentence, verdict

    console = plain_console()
    report, folder = evaluate(config, console)
    console.print(format_table(report))
    for group in report.groups:
        console.print(lead_sentence(group), soft_wrap=True)
    console.print(verdict(report.groups[0])[1], soft_wrap=True)
    console.print(_("Report: {path}").format(path=folder / "report.html"), soft_wrap=True)
    return 0


def transcribe(argv: list[str]) -> int:
    config = parse(TranscribeConfig, argv, "resonance transcribe")
    from resonance.transcribe.output import transcribe_to_output

    return transcribe_to_output(config)


def serve(argv: list[str]) -> int:
    config = parse(ServeConfig, argv, "resonance serve")
    from resonance.serve.command import serve

    return serve(config)


def export(argv: list[str]) -> int:
    config = parse(ExportConfig, argv, "resonance export")
    from resonance.export.command import export

    console = plain_console()
    result = export(config, console)
    for note in result.notes:
        console.print(note, soft_wrap=True)
    console.print(
        _("The result is in {folder} ({size:.0f} MB). Use it:").format(folder=result.folder, size=result.size / 1e6),
        soft_wrap=True,
    )
    for command in result.commands:
        console.print(f"  {command}", soft_wrap=True)
    return 0


def curve(argv: list[str]) -> int:
    config = parse(CurveConfig, argv, "resonance curve")
    from resonance.evaluate.curve import advice, format_table
    from resonance.learning_curve import learning_curve

    console = plain_console()
    points, page = learning_curve(config, console)
    console.print(format_table(points))
    console.print(advice(points), soft_wrap=True)
    console.print(_("Report: {path}").format(path=page), soft_wrap=True)
    return 0


def demo(argv: list[str]) -> int:
    from resonance.cli_data import Parser

    parser = Parser("resonance demo", _("Fine-tune a small model for a simulated speaker and show what it gained."))
    parser.add_argument(
        "--output_dir", type=Path, default=Path("resonance-demo"), help=_("folder for recordings, model and report")
    )
    args = parser.parse_args(argv)
    from resonance.demo import demo

    return demo(args.output_dir, dispatch, plain_console())


def group(title: str, argv: list[str]) -> int:
    """`resonance data …`, `resonance sagemaker …` and `resonance token …`."""
    commands = GROUPS[title]()
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print(_("Commands: {names}.").format(names=", ".join(f"resonance {title} {n}" for n in commands)))
        return 0
    if name not in commands:
        raise ConfigError([unknown(name, commands)])
    return commands[name](rest)


def data_commands() -> dict[str, Command]:
    from resonance import cli_data

    return cli_data.COMMANDS


def sagemaker_commands() -> dict[str, Command]:
    from resonance import cli_sagemaker

    return cli_sagemaker.COMMANDS


def token_commands() -> dict[str, Command]:
    from resonance import cli_token

    return cli_token.COMMANDS


def doctor(argv: list[str]) -> int:
    from resonance.cli_data import Parser

    parser = Parser("resonance doctor", _("Show what this installation can do."))
    parser.add_argument("--hub", action="store_true", help=_("try to reach the model hub"))
    args = parser.parse_args(argv)
    from resonance.doctor import print_report

    return print_report(ask_hub=args.hub)


GROUPS: dict[str, Callable[[], dict[str, Command]]] = {
    "data": data_commands,
    "sagemaker": sagemaker_commands,
    "token": token_commands,
}
COMMANDS: dict[str, Command] = {
    "train": train,
    "plan": plan,
    "evaluate": evaluate,
    "transcribe": transcribe,
    "serve": serve,
    "export": export,
    "curve": curve,
    "demo": demo,
    "doctor": doctor,
}
