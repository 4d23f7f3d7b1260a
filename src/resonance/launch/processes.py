"""`--nproc` and `--nnodes`: the same command in several processes, by torch's elastic launcher (torchrun).

It starts them, lets machines meet, and starts all again from the last checkpoint when one dies. What is ours: plain words
instead of its tables, exit codes that mean the same as those of one process, and no restart where it could not help.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousTimeoutError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from resonance.config import TrainConfig
from resonance.errors import ConfigError, Interrupted, LostContactError, ResonanceError
from resonance.messages import _
from resonance.ranks import FAILURE_FILE

MEETING_SECONDS = 900  # for all machines to come, as torchrun
SAVING_SECONDS = 600  # that processes get to save a checkpoint, once they are told to stop
POLL_SECONDS = 0.2


def run_processes(config: TrainConfig, arguments: Sequence[str], console: Console) -> int:
    """`resonance train ARGUMENTS` in `config.nproc` processes here, together with those of the other machines.

    Returns the exit code of the process that failed first, 0 where all have come to their end. Raises Interrupted on a
    signal, once all have saved, and LostContactError where the machines do not meet.
    """
    with contextlib.ExitStack() as stack:
        failure = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "failure"
        stack.enter_context(_quiet_launcher())
        stack.enter_context(_environment(config.nproc, failure))
        launch = elastic_launch(_launch_config(config), sys.executable)
        try:
            launch("-m", "resonance", "train", *arguments)
        except SignalException as stopped:
            raise Interrupted(_("All processes have been stopped."), stopped.sigval.value) from None
        except ChildFailedError as failed:
            if failure.exists():
                return int(failure.read_text(encoding="utf-8"))
            raise ResonanceError(_what_failed(failed, config)) from None
        except (RendezvousError, OSError, RuntimeError) as error:
            if failure.exists():  # the machines parted because of it
                return int(failure.read_text(encoding="utf-8"))
            raise LostContactError(
                _("The machines could not meet at {address}: {reason}").format(
                    address=config.rdzv or "127.0.0.1", reason=_reason(error)
                )
            ) from error
    return 0


def _reason(error: Exception) -> str:
    if isinstance(error, RendezvousTimeoutError):
        return _(
            "not all have come within {minutes} minutes. Start the command on each of them, and check firewalls."
        ).format(minutes=MEETING_SECONDS // 60)
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _launch_config(config: TrainConfig) -> LaunchConfig:
    meeting: dict[str, object] = {"timeout": MEETING_SECONDS}
    address, local = "127.0.0.1:0", "127.0.0.1"
    if config.nnodes > 1 and config.rdzv:
        address, local = config.rdzv, own_address(config.rdzv)
        meeting["is_host"] = config.node_rank == 0
        if config.node_rank == 0:
            _check_port(config.rdzv, local)
        interface = interface_of(local)
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    return LaunchConfig(
        min_nodes=config.nnodes,
        max_nodes=config.nnodes,
        nproc_per_node=config.nproc,
        run_id="resonance" if config.nnodes > 1 else uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=address,
        rdzv_configs=meeting,
        local_addr=local,
        max_restarts=config.max_restarts,
        monitor_interval=POLL_SECONDS,
        logs_specs=DefaultLogsSpecs(),
        shutdown_timeout=SAVING_SECONDS,
    )


def own_address(meeting: str) -> str:
    """The address under which the machine at `meeting` (host:port) sees this one. Raises ConfigError for an unknown host."""
    host, _colon, port = meeting.rpartition(":")
    try:
        family, kind, _protocol, _name, where = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)  # UDP: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            [
                _(
                    "--rdzv {meeting} cannot be reached from here: {reason}. Give the address of the first machine."
                ).format(meeting=meeting, reason=error.strerror or error)
            ]
        ) from error


def interface_of(address: str) -> str | None:
    """The network interface with this address: gloo would take the one that the host name resolves to."""
    found = (n for n, have in psutil.net_if_addrs().items() if any(a.address == address for a in have))
    return next(found, None)


def _check_port(meeting: str, local: str) -> None:
    port = meeting.rpartition(":")[2]
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((local, int(port)))
        except OSError as error:
            raise ConfigError(
                [
                    _(
                        "--rdzv {meeting}: the port cannot be opened here ({reason}). Choose another one, on all machines; "
                        "or, where this is not the first machine, check --node_rank."
                    ).format(meeting=meeting, reason=error.strerror or error)
                ]
            ) from error


def _what_failed(failed: ChildFailedError, config: TrainConfig) -> str:
    rank, failure = failed.get_first_failure()
    how = (
        _("was ended by signal {number}").format(number=-failure.exitcode)
        if failure.exitcode < 0
        else _("ended with exit code {code}").format(code=failure.exitcode)
    )
    text = _("Process {rank} {how}, {restarts} restarts did not help. Continue from the last checkpoint with --resume.")
    return text.format(rank=rank, how=how, restarts=config.max_restarts)


@contextlib.contextmanager
def _quiet_launcher() -> Iterator[None]:
    """What the launcher logs is for those who develop it; what went wrong is said by the process that it went wrong in."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.")]
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextlib.contextmanager
def _environment(processes: int, failure: Path) -> Iterator[None]:
    """What the processes inherit, where the user has not set it."""
    names = {
        FAILURE_FILE: str(failure),
        # Cores divided among the processes: torchrun would give each a single one.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)),
        # A store of its own for each start. torch 2.13 keeps one for all, and processes that are started again find the
        # addresses there that the dead ones had ("Gloo connectFullMesh failed … Connection refused").
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    before = dict(os.environ)
    os.environ.update({name: value for name, value in names.items() if name not in before or name == FAILURE_FILE})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
