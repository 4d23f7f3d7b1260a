"""`resonance demo`: the whole way on recordings that come with the package, as the commands that a user would type."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from resonance.errors import DataError
from resonance.messages import _

SPEAKER = Path(__file__).parent / "demo_speaker"
MODEL = "resonance/nano"


def demo(output_dir: Path, run_command: Callable[[list[str]], int], console: Console) -> int:
    """Check, train, evaluate and transcribe in `output_dir`. Returns the exit code of the first command that fails, or 0.

    `run_command` runs one `resonance` command line. What an earlier demo left in `output_dir` is used: a training that was
    stopped goes on, one that is finished is only measured again.
    """
    recordings, run = output_dir / "recordings", output_dir / "run"
    copy_recordings(recordings)
    sample = json.loads((recordings / "test.json").read_text(encoding="utf-8"))[0]
    console.print(introduction(recordings), soft_wrap=True)
    plan = output_dir / "plan.yaml"
    steps = [
        (_("Check the recordings"), ["data", "check", str(recordings / "labels.json"), "--model_name_or_path", MODEL]),
        (_("Plan: settings, memory, time"), plan_command(recordings, plan, begun=has_begun(run))),
        (_("Train on 60 of them"), train_command(plan, run)),
        (
            _("Measure on the others, before and after"),
            ["evaluate", "--model_path", str(run), "--test_file", str(recordings / "test.json")],
        ),
        (
            _("Turn one of the others into text (what was said: {text})").format(text=sample["text"]),
            ["transcribe", "--model_path", str(run), "--audio_path", str(recordings / sample["audio"])],
        ),
    ]
    for number, (title, command) in enumerate(steps, 1):
        console.print(f"\n[{number}/{len(steps)}] {title}", style="bold", soft_wrap=True)
        console.print(f"$ resonance {shlex.join(command)}", style="dim", soft_wrap=True)
        code = run_command(command)
        if code:
            return code
    console.print(what_next(run), soft_wrap=True)
    return 0


def plan_command(recordings: Path, plan: Path, *, begun: bool) -> list[str]:
    """A training that has begun goes on with the settings it has: then the plan is only shown."""
    flags = "--target_modules all-linear --max_steps 150 --validation_split 0"
    return [
        *("plan", "--model_name_or_path", MODEL, "--train_file", str(recordings / "train.json")),
        *(*flags.split(), *([] if begun else ["--write", str(plan)])),
    ]


def has_begun(run: Path) -> bool:
    return (run / "config.yaml").is_file()


def train_command(plan: Path, run: Path) -> list[str]:
    if has_begun(run):
        return ["train", "--output_dir", str(run), "--resume"]
    return ["train", "--config", str(plan), "--output_dir", str(run)]


def copy_recordings(folder: Path) -> None:
    """The demo speaker's recordings where a user's would be. Raises DataError when they cannot be written there."""
    try:
        shutil.copytree(SPEAKER, folder, dirs_exist_ok=True)
    except OSError as error:
        raise DataError(
            _(
                "The demo's recordings could not be copied to {folder}: {reason}. Choose another folder with --output_dir."
            ).format(folder=folder, reason=getattr(error, "strerror", None) or error)
        ) from error


def introduction(recordings: Path) -> str:
    return "\n".join(
        [
            _("This is what Resonance does with a person's recordings, in about five minutes, without a network."),
            _(
                "The speaker is simulated: a synthetic voice, slowed and slurred, that the model hardly understands. "
                "The recordings are in {folder}; listen to some."
            ).format(folder=recordings / "audio"),
            _("The model, {model}, is a very small Whisper that was made for trying things out.").format(model=MODEL),
        ]
    )


def what_next(run: Path) -> str:
    return "\n".join(
        [
            "",
            _("The report with charts and recordings to listen to: {path}").format(path=run / "report.html"),
            _("With your own recordings, laid out as in the demo's folder, and a real Whisper:"),
            "  resonance data check my_recordings",
            "  resonance plan --model_name_or_path openai/whisper-small --train_file my_recordings/labels.json",
            "  resonance train --model_name_or_path openai/whisper-small --train_file my_recordings/labels.json "
            "--language zh --output_dir runs/mine",
            "  resonance evaluate --model_path runs/mine",
            _("Would more recordings help? This trains on 10, 30, 50 and 100 of them:"),
            "  resonance curve --model_name_or_path openai/whisper-small --train_file my_recordings/labels.json "
            "--language zh --output_dir runs/curve",
        ]
    )
