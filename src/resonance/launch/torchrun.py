"""From a SageMaker container's environment to the command that trains on its processors and all machines of the job."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resonance.errors import ConfigError, ResonanceError
from resonance.messages import _

PORT = "7777"
SECONDS_TO_SAVE = 110
ENTRY = ("-m", "resonance.sagemaker_entry")


@dataclass(frozen=True, slots=True)
class Cluster:
    """The machines of a job, and this one among them."""

    hosts: tuple[str, ...]
    current: str
    interface: str
    processes: int  # on each machine: one for every GPU, or one

    @property
    def rank(self) -> int:
        return self.hosts.index(self.current)


def cluster(environment: Mapping[str, str]) -> Cluster:
    """From `SM_HOSTS` and its like, or resourceconfig.json where those are not set. Raises ConfigError."""
    file = Path(environment.get("SM_INPUT_CONFIG_DIR", "/opt/ml/input/config")) / "resourceconfig.json"
    try:
        resources = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        hosts = json.loads(environment["SM_HOSTS"]) if "SM_HOSTS" in environment else resources.get("hosts", ["algo-1"])
        current = environment.get("SM_CURRENT_HOST", resources.get("current_host", hosts[0]))
        found = Cluster(
            tuple(sorted(hosts)),
            current,
            environment.get("SM_NETWORK_INTERFACE_NAME", resources.get("network_interface_name", "eth0")),
            max(1, int(environment["SM_NUM_GPUS"]) if "SM_NUM_GPUS" in environment else count_gpus()),
        )
        found.rank  # noqa: B018 - raises ValueError where this machine is not among the hosts
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            [
                _("{path}, SM_HOSTS, SM_CURRENT_HOST or SM_NUM_GPUS make no sense: {reason}").format(
                    path=file, reason=error
                )
            ]
        ) from None
    return found


def count_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def command(machines: Cluster, argv: Sequence[str], entry: Sequence[str] = ENTRY) -> list[str]:
    """What to run on this machine. One process alone needs no launcher, and gets SIGTERM without delay."""
    if len(machines.hosts) == machines.processes == 1:
        return [sys.executable, *entry, *argv]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={len(machines.hosts)}", f"--node_rank={machines.rank}"),
        *(f"--nproc_per_node={machines.processes}", f"--master_addr={machines.hosts[0]}", f"--master_port={PORT}"),
        *_patience(),
        *(*entry, *argv),
    ]


def _patience() -> list[str]:
    """More than torchrun's 30 s between SIGTERM and the kill, where it takes it: SageMaker leaves 120 to save a checkpoint."""
    torch = importlib.util.find_spec("torch")  # finds the folder, imports nothing
    if torch is None or not torch.submodule_search_locations:
        return []
    launcher = Path(torch.submodule_search_locations[0]) / "distributed" / "run.py"
    known = "--shutdown-timeout" in launcher.read_text(encoding="utf-8")
    return [f"--shutdown-timeout={SECONDS_TO_SAVE}"] if known else []


def main() -> None:
    try:
        machines = cluster(os.environ)
    except ResonanceError as error:
        print(_("Error: {message}").format(message=error), file=sys.stderr)
        sys.exit(error.exit_code)
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(name, machines.interface)
    script = os.environ.get("RESONANCE_ENTRY")
    words = command(machines, sys.argv[1:], [script] if script else ENTRY)
    print(" ".join(words), flush=True)
    os.execv(words[0], words)  # in place of this process, so that SageMaker's SIGTERM arrives


if __name__ == "__main__":
    main()
