"""Python programs in processes of their own that need not import torch again.

A new Python takes about five seconds of processor time until it has imported torch and transformers. These are forked from a
server that has: each is a real process with its own signals, exit code, working directory and environment, and begins in a tenth
of a second. Pythons that it starts in turn are forked from it. What they do not show is what happens while libraries are imported;
tests of that start a new Python. Elsewhere than on Linux each is a new Python.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import inspect
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from multiprocessing import process as started
from pathlib import Path
from typing import Any

FORKS = sys.platform == "linux"
SERVER = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    SERVER.set_forkserver_preload(
        [
            "resonance.finetune",
            "resonance.evaluate.evaluation",
            "resonance.transcribe.output",
            "transformers.models.whisper.modeling_whisper",
            "torch.distributed.launcher.api",
        ]
    )
EXECUTE = subprocess.Popen._execute_child
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")  # p: parent, c: child


class Forked:
    """`python ARGUMENTS` in a process of its own, in the manner of `subprocess.Popen`.

    What it prints goes to the end of the file `out`; errors too, unless they have a file of their own.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        out: Path,
        errors: Path | None = None,
        environment: Mapping[str, str] | None = None,
        new_session: bool = False,
    ) -> None:
        self.args = list(map(str, arguments))
        given = (self.args, str(Path.cwd()), dict(environment or os.environ), str(out), str(errors or out), new_session)
        self.process = SERVER.Process(target=_begin, args=given)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.process.exitcode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(arguments: Sequence[object], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a Python program that was given `arguments` printed, to files in `folder`."""
    number = time.monotonic_ns()
    out, errors = folder / f"{number}.out", folder / f"{number}.err"
    code = Forked(arguments, out=out, errors=errors, environment={**os.environ, **environment}).wait()
    said = [path.read_text(encoding="utf-8", errors="replace") for path in (out, errors)]
    return subprocess.CompletedProcess(list(arguments), code, *said)


def _begin(
    arguments: list[str], directory: str, environment: dict[str, str], out: str, errors: str, new_session: bool
) -> None:
    gc.freeze()  # searches for garbage leave out what was imported
    if new_session:
        os.setsid()
    for number, path in ((1, out), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)
    if FORKS:
        subprocess.Popen._execute_child = _fork_python
    _become(arguments, directory, environment)


def _become(arguments: list[str], directory: str, environment: dict[str, str]) -> None:
    """What `python ARGUMENTS` does, in this process."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    multiprocessing.set_start_method(None, force=True)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    importlib.invalidate_caches()
    if any(Path(path, "sitecustomize.py").is_file() for path in sys.path[:2]):
        sys.modules.pop("sitecustomize", None)
        importlib.import_module("sitecustomize")
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _fork_python(popen: Any, *given: Any) -> None:
    """In place of `subprocess.Popen._execute_child`, where that would begin a new Python."""
    asked = inspect.signature(EXECUTE).bind(popen, *given).arguments
    command = [os.fspath(part) for part in asked["args"]] if not isinstance(asked["args"], (str, bytes)) else [""]
    if command[0] != sys.executable:
        EXECUTE(popen, *given)
        return
    process = multiprocessing.get_context("fork").Process(target=_forked, args=(command[1:], asked))
    process.start()
    started._children.discard(process)  # `popen` waits for it
    popen.process = process
    popen.pid = process.pid
    popen._child_created = True
    popen._close_pipe_fds(*(asked[name] for name in PIPES))


def _forked(arguments: list[str], asked: dict[str, Any]) -> None:
    subprocess.Popen._execute_child = EXECUTE
    if asked["start_new_session"]:
        os.setsid()
    for number, name in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if asked[name] != -1:
            os.dup2(asked[name], number)
    for name in ("p2cwrite", "c2pread", "errread"):
        if asked[name] != -1:
            os.close(asked[name])
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    # What the parent would clean up is its own.
    atexit._clear()
    weakref.finalize._registry.clear()
    weakref.finalize._registered_with_atexit = False
    _become(arguments, asked["cwd"] or str(Path.cwd()), dict(asked["env"] or os.environ))
