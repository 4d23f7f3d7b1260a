"""Which of the processes that train together this one is, as torchrun, accelerate, DeepSpeed's launcher or Slurm say."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from resonance.errors import ConfigError
from resonance.messages import _

FAILURE_FILE = (
    "RESONANCE_FAILURE_FILE"  # environment: where a process leaves the exit code of a failure that would repeat
)
PORT_BASE, PORT_RANGE = 20_000, 20_000  # for Slurm, which names no port


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all."""

    rank: int = 0
    world: int = 1
    local: int = 0  # among those of this machine, which decides its GPU
    restarts: int = 0  # how often torchrun has started all of them again
    launched: bool = False  # whether something has started it as one of several, be it of one
    own_disk: bool = False  # whether other machines do not see what the main one writes

    @property
    def main(self) -> bool:
        """Whether this one speaks for all, and writes the result."""
        return self.rank == 0

    @property
    def writes(self) -> bool:
        """Whether this one writes what a run is continued from: one for each disk."""
        return self.main or (self.own_disk and self.local == 0)


def ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Of this process; alone where nothing says otherwise. Raises ConfigError where a variable is no number."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Ranks(
            _number(environment, "RANK"),
            _number(environment, "WORLD_SIZE"),
            _number(environment, "LOCAL_RANK", 0),
            _number(environment, "TORCHELASTIC_RESTART_COUNT", 0),
            launched=True,
        )
    if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environment:  # inside srun
        return Ranks(
            _number(environment, "SLURM_PROCID"),
            _number(environment, "SLURM_STEP_NUM_TASKS"),
            _number(environment, "SLURM_LOCALID", 0),
            launched=True,
        )
    return Ranks()


def meeting_point(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What torch needs to find the other processes and the environment does not hold yet: Slurm's names, translated."""
    mine = ranks(environment)
    found = {"RANK": str(mine.rank), "WORLD_SIZE": str(mine.world), "LOCAL_RANK": str(mine.local)}
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        found["MASTER_ADDR"] = first_host(nodes) or "127.0.0.1"
    if "MASTER_PORT" not in environment:
        found["MASTER_PORT"] = str(PORT_BASE + _number(environment, "SLURM_JOB_ID", 0) % PORT_RANGE)
    return {name: value for name, value in found.items() if environment.get(name) != value}


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    found = environment.get(name, "")
    if re.fullmatch(r"\d{1,9}", found, re.ASCII):
        return int(found)
    if not found:
        return default
    raise ConfigError(
        [
            _(
                "{name} is “{found}” in the environment; programs that start several processes set it to a number. Remove it: "
                "unset {name}"
            ).format(name=name, found=found[:100])
        ]
    )


def first_host(nodes: str) -> str:
    """The first of Slurm's list: `gpu[03-05,09],login1` gives `gpu03`."""
    name = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in name.groups()) if name else ""
