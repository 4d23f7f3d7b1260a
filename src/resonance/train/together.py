"""What the processes of one training do together: meet, agree, and end together when one of them cannot go on.

Every process reads the recordings and builds the model itself; the main one speaks and writes. A decision that all have to
take alike, and every error before the first step, is exchanged, so that none is left waiting for another.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from resonance.config import TrainConfig
from resonance.errors import ConfigError, ElsewhereError, LostContactError, ResonanceError
from resonance.messages import _
from resonance.model import runs
from resonance.model.checkpoints import complete_steps, set_aside
from resonance.ranks import Ranks, meeting_point, ranks
from resonance.train.resume import FREE
from resonance.train.rows import Rows, fingerprint

T = TypeVar("T")
LOADERS_SECONDS = 30
WAIT_SECONDS = 1800  # for another process, as transformers' ddp_timeout, which changes it
# What torch says where another process is gone or does not answer: gloo, NCCL, the store through which they met.
CONTACT = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "timed out",
    "NCCL",
    "Broken pipe",
)


# The process group, to the end of the process. DDP's reducer would else destroy it while it holds the interpreter's lock and
# joins gloo's thread, which may be waiting for that lock to free its last tensors: one stop in four hung (torch 2.13).
_KEPT: list[Any] = []


@contextlib.contextmanager
def joined(config: TrainConfig) -> Iterator[Ranks]:
    """Meet the other processes of this training, if there are any; leave them at the end.

    Raises LostContactError where they do not come, or where contact is lost inside the block.
    """
    mine = ranks()
    if not mine.launched or distributed.is_initialized():
        yield mine
        return
    os.environ |= meeting_point()
    on_gpu = torch.cuda.is_available() and not config.extra.get("use_cpu")
    if on_gpu:
        if mine.local >= torch.cuda.device_count():
            raise ConfigError(
                [
                    _("{wanted} processes are started on a machine with {count} GPUs. Give --nproc {count}.").format(
                        wanted=os.environ.get("LOCAL_WORLD_SIZE", mine.local + 1), count=torch.cuda.device_count()
                    )
                ]
            )
        torch.cuda.set_device(mine.local)
    seconds = int(config.extra.get("ddp_timeout", WAIT_SECONDS))
    try:
        # gloo beside NCCL: what the processes tell each other is no work for the GPUs.
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        raise LostContactError(
            _("Process {rank} of {world} could not meet the others at {address}:{port}: {reason}").format(
                rank=mine.rank,
                world=mine.world,
                address=os.environ["MASTER_ADDR"],
                port=os.environ["MASTER_PORT"],
                reason=_first_line(error),
            )
        ) from error
    _KEPT.append(distributed.group.WORLD)
    try:
        yield mine
    except RuntimeError as error:
        cause = _lost_contact(error)
        if cause is None:
            raise
        raise LostContactError(
            _(
                "Process {rank} of {world} has lost contact with another one, which has ended or has not answered for "
                "{seconds} s (--ddp_timeout): {reason}"
            ).format(rank=mine.rank, world=mine.world, seconds=seconds, reason=_first_line(cause))
        ) from error
    finally:
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


def _lost_contact(error: BaseException | None) -> BaseException | None:
    """What says so: `error`, or what it was raised on top of."""
    while error is not None and not any(text in str(error) for text in CONTACT):
        error = error.__context__
    return error


def _first_line(error: BaseException) -> str:
    """What torch says, without the place in its source and its advice."""
    line = str(error).strip().partition("\n")[0].partition(". This is typically")[0]
    return re.sub(r"\[/\S+\] ", "", line) or type(error).__name__


@contextlib.contextmanager
def agreeing(mine: Ranks) -> Iterator[None]:
    """Errors of ours in the block end all processes, and are said once: by the main one, with who had them.

    The others raise ElsewhereError, which says nothing.
    """
    if mine.world == 1:
        yield
        return
    error: ResonanceError | None = None
    try:
        yield
    except ResonanceError as caught:
        error = caught
    found = gathered(mine, (str(error), error.exit_code) if error else None)  # by rank
    code = max((had[1] for had in found if had), default=0)
    if not code:
        return
    if not mine.main:
        raise ElsewhereError(code)
    if error is not None and len(set(found)) == 1:
        raise error
    lines = []
    for had in dict.fromkeys(had for had in found if had):
        having = [str(rank) for rank, other in enumerate(found) if other == had]
        lines.append(_("process {ranks}: {message}").format(ranks=", ".join(having), message=had[0]))
    combined = ResonanceError("\n".join(lines))
    combined.exit_code = code
    raise combined


def by_main(mine: Ranks, work: Callable[[], T]) -> T:
    """`work()` done by the main process alone; its result for all. An error of it ends all."""
    result: T | None = None
    with agreeing(mine):
        if mine.main:
            result = work()
    return shared(mine, result)  # type: ignore[return-value]


@contextlib.contextmanager
def claim(path: Path, *, resume: bool, mine: Ranks) -> Iterator[tuple[runs.RunFolder, Ranks]]:
    """`runs.claim` for all processes: by the main one, and by one on each machine that has the folder on a disk of its own.

    Yields the folder, and `mine` with what is now known about that.
    """
    with contextlib.ExitStack() as stack:
        # A process that was killed may leave loaders behind for some seconds, which hold the lock with it.
        patience = LOADERS_SECONDS if mine.restarts else 0
        by_main(mine, lambda: stack.enter_context(runs.claim(path, resume=resume, patience=patience)))
        run = runs.RunFolder(path)  # each process has its own path for it
        mine = replace(mine, own_disk=not all(gathered(mine, _sees(run, mine))))
        with agreeing(mine):
            if mine.writes and not mine.main:
                stack.enter_context(runs.claim(path, resume=resume, patience=patience))
        yield run, mine


def _sees(run: runs.RunFolder, mine: Ranks) -> bool:
    """Whether this process reads what the main one writes."""
    if mine.world == 1:
        return True
    token = shared(mine, f"{platform.node()} {os.getpid()} {os.urandom(8).hex()}")
    probe = run.path / ".shared"
    if mine.main:
        probe.write_text(token, encoding="utf-8")
    wait(mine)
    try:
        return probe.read_text(encoding="utf-8") == token
    except OSError:
        return False
    finally:
        wait(mine)
        if mine.main:
            probe.unlink(missing_ok=True)


def go_back_to_common(run: runs.RunFolder, mine: Ranks) -> None:
    """Where machines have disks of their own: set aside the checkpoints newer than the newest that all of them have whole."""
    if not mine.own_disk:
        return
    steps = complete_steps(run.checkpoints)
    common = set.intersection(*map(set, gathered(mine, steps)))
    if mine.writes:
        for step in steps:
            if step > max(common, default=0):
                set_aside(run.checkpoints / f"checkpoint-{step}")
    wait(mine)


def check_same(mine: Ranks, config: TrainConfig, rows: Rows, run: runs.RunFolder) -> None:
    """Raise ConfigError where processes have other settings, recordings or versions than the main one: nothing good would
    come of training together."""
    if mine.world == 1:  # the fingerprints of many recordings take a while
        return
    latest = run.latest_checkpoint()
    facts: dict[str, Any] = {
        name: value for name, value in config.model_dump(mode="json").items() if name not in FREE or name in COMMON
    }
    facts["recordings"] = f"{len(rows.train)} {fingerprint(rows.train)[:12]}"
    facts["held-out recordings"] = f"{len(rows.held_out)} {fingerprint(rows.held_out)[:12]}"
    facts["streamed data"] = rows.stream.fingerprint[:12] if rows.stream else None
    facts["checkpoint"] = latest.name if latest else None
    facts["torch"] = torch.__version__
    found = gathered(mine, (platform.node(), facts))
    first = found[0][1]
    lines = [
        _("  {name}: {before} in process 0, {now} in process {rank} on {host}").format(
            name=name, before=first[name], now=other[name], rank=rank, host=host
        )
        for rank, (host, other) in enumerate(found)
        for name in first
        if other[name] != first[name]
    ]
    if lines:
        head = _("The processes were not started with the same command, data or packages:")
        raise ConfigError(["\n".join([head, *lines[:10]])])


PATHS = (
    "output_dir",
    "train_file",
    "validation_file",
    "dataset_dir",
    "cache_dir",
    "feature_cache_dir",
)  # each machine's own
COMMON = frozenset(
    {
        *("max_steps", "num_train_epochs", "eval_strategy", "eval_steps", "save_steps", "logging_steps"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("early_stopping_patience", "load_best_model_at_end"),
    }
)


def gathered(mine: Ranks, value: T) -> list[T]:
    """The values of all processes, in the order of their ranks."""
    if mine.world == 1:
        return [value]
    found: list[Any] = [None] * mine.world
    distributed.all_gather_object(found, value)
    return found


def shared(mine: Ranks, value: T) -> T:
    """The main process' value."""
    if mine.world == 1:
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[no-any-return]


def wait(mine: Ranks) -> None:
    """Until all processes are here."""
    if mine.world > 1:
        distributed.barrier()


def largest(value: int) -> int:
    """Of all processes' values: for a signal that only some have received. Cheap enough for every step."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    box = torch.tensor([value])
    distributed.all_reduce(box, op=distributed.ReduceOp.MAX)
    return int(box)
