"""`resonance train --nproc 2`: the same result as one process, whatever happens to one of the two.

The training that all others are compared with is started as users start it; the others are forked (`forked.py`), the launcher
from a server, and from it the processes that train.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from forked import Forked
from resonance.model.runs import RunFolder, read_events

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package"),
    pytest.mark.skipif(os.name == "nt", reason="signals and /proc of Unix"),
]
SECONDS_AT_MOST = 240
TOLERANCE = 1e-4
PLAIN = [
    *("--max_steps=6", "--eval_steps=2", "--logging_steps=1", "--learning_rate=0.01", "--warmup_steps=1"),
    *("--language=en", "--lora_r=4", "--use_cpu", "--validation_split=0.25", "--context_alignment_steps=2"),
    *("--per_device_eval_batch_size=2", "--dataloader_num_workers=1", "--save_total_limit=none"),
    "--lora_dropout=0",
]
TWO = ["--nproc=2", "--per_device_train_batch_size=2"]


class Training:
    """`resonance train` in the background, with what it prints in a file. `on`: what runs modules there."""

    def __init__(
        self,
        folder: Path,
        name: str,
        arguments: list[str],
        *,
        on: Sequence[str] = ("-m",),
        fresh: bool = False,
        **environment: str,
    ) -> None:
        self.out = folder / name
        self.log = folder / f"{name}.log"
        command = [*on, "resonance", "train", *arguments, "--output_dir", str(self.out)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        self.process: Forked | subprocess.Popen[bytes]
        if fresh:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [sys.executable, *command], env=environment, stdout=log, stderr=log, start_new_session=True
                )
        else:
            self.process = Forked(command, out=self.log, environment=environment, new_session=True)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> int:
        return self.process.wait(timeout=SECONDS_AT_MOST)

    def until(self, seen: Callable[[], Any]) -> None:
        deadline = time.monotonic() + SECONDS_AT_MOST
        while not seen():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        """The process of that rank, of two: the launcher starts them in order."""
        found: list[psutil.Process] = []

        def seen() -> bool:
            children = psutil.Process(self.process.pid).children()
            found[:] = sorted(children, key=lambda child: (child.create_time(), child.pid))
            return len(found) == 2

        self.until(seen)
        return found[number]

    def checkpoint(self, step: int) -> bool:
        return (self.out / "checkpoints" / f"checkpoint-{step}" / "complete.json").is_file()

    def losses(self) -> dict[int, float]:
        return {row["step"]: row["loss"] for row in read_events(self.out / "events.jsonl") if "loss" in row}

    def scores(self) -> list[tuple[float, ...]]:
        rows = [row for row in read_events(self.out / "events.jsonl") if "eval_loss" in row]
        return [tuple(row[f"eval_{name}"] for name in ("loss", "cer", "wer", "utterances")) for row in rows]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.out / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def train(
    folder: Path, tiny_model: Path, recordings_in: Callable[[Path, int], Path]
) -> Iterator[Callable[..., Training]]:
    """A function that begins a training into a folder of this name."""
    labels = recordings_in(folder / "recordings", 22)
    rows = json.loads(labels.read_text(encoding="utf-8"))
    for i, row in enumerate(rows):
        row["text"] = "x" * (1 + 13 * i % 40)
    labels.write_text(json.dumps(rows), encoding="utf-8")
    started: list[Training] = []

    def start(name: str, *arguments: str, **given: Any) -> Training:
        command = ["--train_file", str(labels), "--model_name_or_path", str(tiny_model), *PLAIN, *arguments]
        started.append(Training(folder, name, command, **given))
        return started[-1]

    yield start
    for training in started:
        if training.process.poll() is None:
            for process in psutil.Process(training.process.pid).children(recursive=True):
                process.kill()
            training.process.kill()
            training.process.wait()


@pytest.fixture(scope="module")
def whole(train: Callable[..., Training]) -> Training:
    """A training by two processes that nothing disturbed."""
    both = train("both", *TWO, fresh=True)
    assert both.end() == 0, both.said()
    return both


def assert_same(one: Training, other: Training, tolerance: float) -> None:
    assert one.losses() == pytest.approx(other.losses(), abs=tolerance)
    for left, right in zip(one.scores(), other.scores(), strict=True):
        assert left == pytest.approx(right, abs=tolerance)
    assert_same_weights(one, other, tolerance)


def assert_same_weights(one: Training, other: Training, tolerance: float) -> None:
    other_weights = other.weights()
    for name, weight in one.weights().items():
        torch.testing.assert_close(weight, other_weights[name], rtol=0, atol=tolerance, msg=name)


def python_path(first: Path) -> str:
    return os.pathsep.join([str(first), *filter(None, [os.environ.get("PYTHONPATH")])])


def test_two_processes_train_and_measure_as_one(train: Callable[..., Training], whole: Training) -> None:
    alone = train("alone", "--per_device_train_batch_size=4")
    assert alone.end() == 0, alone.said()
    assert_same(alone, whole, TOLERANCE)
    assert whole.scores()[0][-1] == alone.scores()[0][-1] > 0  # no held-out row is counted twice to fill up a batch
    assert whole.said().count("Effective batch: 4 = 2 per device x 1 accumulated x 2 device(s)") == 1
    assert whole.said().count("The result is in") == 1 and "Traceback" not in whole.said()
    assert alone.said().count("differed from what it hears") == whole.said().count("differed from what it hears") == 1


# accelerate divides models among GPUs only, and Resonance says so. Without both, PyTorch's FSDP does it on processors too.
FSDP_ON_PROCESSORS = """
from accelerate import state
from resonance.train import arguments

first, asked = state.AcceleratorState.__init__, arguments.sharding_arguments

def divided(self, *given, fsdp_plugin=None, **more):
    first(self, *given, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type

state.AcceleratorState.__init__ = divided
arguments.sharding_arguments = lambda config, on_cpu: asked(config, False)
"""


@pytest.fixture
def fsdp(tmp_path: Path) -> dict[str, str]:
    """The environment in which `--fsdp` does on processors what it does on GPUs."""
    (tmp_path / "sitecustomize.py").write_text(FSDP_ON_PROCESSORS)
    return {"PYTHONPATH": python_path(tmp_path)}


def test_an_adapter_trained_with_fsdp_is_that_of_one_process_also_after_a_kill(
    train: Callable[..., Training], whole: Training, fsdp: dict[str, str]
) -> None:
    divided = train("fsdp", *TWO, "--fsdp", **fsdp)
    divided.until(lambda: divided.checkpoint(2))
    divided.rank(1).kill()
    assert divided.end() == 0, divided.said()
    assert "started again (1 of 3)" in divided.said()
    assert_same(divided, whole, TOLERANCE)


def test_a_model_fully_trained_with_fsdp_is_the_folder_of_one_process(
    train: Callable[..., Training], fsdp: dict[str, str]
) -> None:
    full = ["--finetuning=full", "--learning_rate=0.0005", "--max_steps=2"]
    one = train("full", "--per_device_train_batch_size=4", *full)
    divided = train("full-fsdp", *TWO, "--fsdp", *full, **fsdp)
    assert one.end() == 0, one.said()
    assert divided.end() == 0, divided.said()
    ours, theirs = (sorted(path.name for path in (training.out / "model").iterdir()) for training in (one, divided))
    assert ours == theirs
    ours, theirs = (load_file(training.out / "model" / "model.safetensors") for training in (one, divided))
    assert ours.keys() == theirs.keys()  # the tied matrix once, as everywhere
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=TOLERANCE, msg=name)


def test_a_process_that_is_killed_costs_time_and_nothing_else(train: Callable[..., Training], whole: Training) -> None:
    broken = train("killed", *TWO)
    broken.rank(1).kill()  # at its very beginning, then in the middle
    broken.until(lambda: broken.checkpoint(2))
    broken.rank(1).kill()
    assert broken.end() == 0, broken.said()
    assert_same(whole, broken, 0.0)
    assert "started again (2 of 3)" in broken.said() and "Traceback" not in broken.said()


@pytest.mark.parametrize("method", ["training_step", "prediction_step"])
def test_a_signal_to_the_launcher_ends_with_a_checkpoint_and_the_run_goes_on(
    train: Callable[..., Training], whole: Training, tmp_path: Path, method: str
) -> None:
    """Also one that comes while the processes measure: they measure again first, and then still learn from each other."""
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, signal, time
if os.environ.get("RANK") == "1":
    from resonance.train.trainer import WhisperTrainer
    real = WhisperTrainer.{method}
    def step(self, *given, **named):
        if self.state.global_step == 2 and not getattr(self, "signalled", False):
            self.signalled = True
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)  # until the launcher has passed it on
        return real(self, *given, **named)
    WhisperTrainer.{method} = step
"""
    )
    stopped = train(method, *TWO, PYTHONPATH=python_path(tmp_path))
    assert stopped.end() == 143, stopped.said()
    step = {"training_step": 3, "prediction_step": 2}[method]
    assert re.search(rf"Stopped at step {step}\. .* is saved; continue with --resume", stopped.said())
    assert "Traceback" not in stopped.said() and not RunFolder(stopped.out).result
    again = train(method, *TWO, "--resume")
    assert again.end() == 0, again.said()
    assert_same(whole, again, 0.0)


def test_memory_that_runs_out_in_one_process_makes_all_go_on_with_smaller_batches(
    train: Callable[..., Training], whole: Training, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        """
import os, sys
if os.environ.get("RANK") == "1":
    import torch
    from resonance.train.trainer import WhisperTrainer
    real = WhisperTrainer.training_step
    def step(self, model, inputs, *given):
        if len(inputs["labels"]) > 1 and self.state.global_step >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, model, inputs, *given)
    WhisperTrainer.training_step = step
"""
    )
    small = train("small", *TWO, PYTHONPATH=python_path(tmp_path))
    assert small.end() == 0, small.said()
    assert_same(whole, small, TOLERANCE)
    fitted = json.loads((small.out / "fitted.json").read_text())
    assert (fitted["per_device_train_batch_size"], fitted["gradient_accumulation_steps"]) == (1, 2)
    assert "Out of memory" in small.said() and "started again (1 of 3)" in small.said()


def test_a_process_that_hangs_is_given_up_after_the_time_limit(train: Callable[..., Training]) -> None:
    hanging = train("hanging", *TWO, "--ddp_timeout=12", "--max_restarts=0", "--max_steps=2000")
    hanging.until(lambda: hanging.checkpoint(2))
    hanging.rank(1).suspend()
    began = time.monotonic()
    assert hanging.end() == 1, hanging.said()
    assert time.monotonic() - began < 100
    assert "Process 0 of 2 has lost contact with another one" in hanging.said()
    assert "12 s (--ddp_timeout)" in hanging.said() and "Traceback" not in hanging.said()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_processes_with_other_recordings_or_settings_do_not_begin(
    train: Callable[..., Training], folder: Path, tmp_path: Path
) -> None:
    """Under a launcher of the user's own, each process has a command of its own."""
    labels = folder / "recordings" / "labels.json"
    rows = json.loads(labels.read_text())
    for row in rows:
        row["audio"] = str(labels.parent / row["audio"])
    rows[0]["text"] = "another text"
    (tmp_path / "other.json").write_text(json.dumps(rows))
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    changes: list[list[str]] = [[], ["--train_file", str(tmp_path / "other.json"), "--lora_alpha=8"]]
    both = [
        train("apart", *arguments, **place, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, arguments in enumerate(changes)
    ]
    assert [one.end() for one in both] == [2, 2], both[0].said()
    said = both[0].said()
    assert said.count("Error:") == 1 and "lora_alpha: 32 in process 0, 8 in process 1" in said
    assert "recordings: " in said
    assert not RunFolder(both[0].out).latest_checkpoint()


def test_no_process_aborts_while_a_thread_of_torch_still_frees_what_was_exchanged() -> None:
    """With sys.exit, one in six ended with SIGABRT instead of its exit code."""
    ending = """
import sys, torch
from torch import distributed
from resonance.cli import leave
distributed.init_process_group("gloo")
kept = distributed.group.WORLD
sys.setswitchinterval(100)  # the thread does not get the interpreter's lock
for _ in range(300):
    work = distributed.all_reduce(torch.ones(200_000), async_op=True)
work.wait()
distributed.destroy_process_group()
leave(2)
"""
    for _attempt in range(2):
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        both = [
            subprocess.Popen([sys.executable, "-c", ending], env={**os.environ, **place, "RANK": str(rank)})
            for rank in range(2)
        ]
        assert [one.wait(timeout=SECONDS_AT_MOST) for one in both] == [2, 2]


def test_what_cannot_work_is_said_once_and_not_tried_again(train: Callable[..., Training], tmp_path: Path) -> None:
    missing = train("missing", "--train_file", str(tmp_path / "missing.json"), *TWO, "--max_restarts=1")
    assert missing.end() == 1
    assert missing.said().count("missing.json") == 1 and "Traceback" not in missing.said()


ENTER = """
import ctypes, os, runpy, sys
assert ctypes.CDLL(None).setns(os.open(f"/run/netns/{sys.argv[1]}", os.O_RDONLY), 0) == 0
del sys.argv[:2]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """How to run a module on each of two hosts: network namespaces, each with its own address, joined by a cable."""
    names = [f"resonance-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"v{os.getpid() % 100_000}-{i}" for i in range(2)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs root and `ip netns` (iproute2)")
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), 1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["-c", ENTER, name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.parametrize("own_disks", [False, True])
def test_two_machines_meet_and_train_as_one(
    own_disks: bool, train: Callable[..., Training], whole: Training, hosts: list[list[str]]
) -> None:
    meeting = ["--nnodes=2", "--rdzv=10.77.0.1:29417", "--per_device_train_batch_size=2", "--lora_dropout=0"]
    names = [f"machines-{own_disks}-0", f"machines-{own_disks}-{int(own_disks)}"]
    both = [
        train(name, *meeting, f"--node_rank={i}", on=host)
        for i, (name, host) in enumerate(zip(names, hosts, strict=True))
    ]
    assert [one.end() for one in both] == [0, 0], both[0].said() + both[1].said()
    assert_same(whole, both[0], TOLERANCE)
    assert both[0].said().count("The result is in") == 1 and "Traceback" not in both[0].said()
    assert all(one.checkpoint(6) for one in both)  # each machine can go on from what it sees
    if own_disks:  # the second was stopped before its last checkpoint was whole: both go back to the one before
        (both[1].out / "checkpoints" / "checkpoint-6" / "complete.json").unlink()
        for one in both:
            (one.out / "adapter").rename(one.out / "before")
        both = [
            train(name, *meeting, f"--node_rank={i}", "--resume", on=host)
            for i, (name, host) in enumerate(zip(names, hosts, strict=True))
        ]
        assert [one.end() for one in both] == [0, 0], both[0].said() + both[1].said()
        assert "step 5/6" in both[0].said().rpartition("Recordings:")[2]
        for one in both:
            assert_same_weights(whole, one, TOLERANCE)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--nnodes=2"], "nnodes 2 needs rdzv"),
        (["--nnodes=2", "--rdzv=here"], "not an address with a port"),
        (["--nnodes=2", "--rdzv=127.0.0.1:29400", "--node_rank=2"], "node_rank 2 is not below nnodes 2"),
        (["--nnodes=2", "--rdzv=no.such.host.invalid:29400", "--node_rank=1"], "cannot be reached from here"),
    ],
)
def test_machines_that_cannot_meet_are_told_why(
    given: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from resonance.cli import run

    assert run(["train", "--train_file", "labels.json", "--output_dir", str(tmp_path / "run"), *given]) == 2
    assert said in capfd.readouterr().err


def test_a_port_that_is_taken_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from resonance.cli import run

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        meeting = f"127.0.0.1:{taken.getsockname()[1]}"
        given = ["--train_file", "labels.json", "--output_dir", str(tmp_path / "run"), "--nnodes=2", "--rdzv", meeting]
        assert run(["train", *given]) == 2
    assert f"--rdzv {meeting}" in capfd.readouterr().err
