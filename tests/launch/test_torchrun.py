"""The command that a machine of a job starts its processes with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from resonance.errors import ConfigError
from resonance.launch.torchrun import Cluster, cluster, command

LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
ENTRY = ["-m", "resonance.sagemaker_entry"]


def test_two_machines_with_eight_gpus_each(tmp_path: Path) -> None:
    environment = {
        "SM_HOSTS": '["algo-2", "algo-1"]',
        "SM_CURRENT_HOST": "algo-2",
        "SM_NUM_GPUS": "8",
        "SM_NETWORK_INTERFACE_NAME": "eth1",
        "SM_INPUT_CONFIG_DIR": str(tmp_path),
    }
    machines = cluster(environment)
    assert machines == Cluster(("algo-1", "algo-2"), "algo-2", "eth1", 8)
    words = command(machines, ["--max_steps=4"])
    assert [word for word in words if not word.startswith("--shutdown")] == [
        *(*LAUNCHER, "--nnodes=2", "--node_rank=1", "--nproc_per_node=8", "--master_addr=algo-1", "--master_port=7777"),
        *(*ENTRY, "--max_steps=4"),
    ]


def test_torchrun_takes_the_command() -> None:
    run = pytest.importorskip("torch.distributed.run")
    words = command(Cluster(("algo-1", "algo-2"), "algo-1", "eth0", 8), ["--max_steps=4"])
    taken = run.parse_args(words[3:])
    assert (taken.nnodes, taken.nproc_per_node, taken.node_rank, taken.master_addr) == ("2", "8", 0, "algo-1")
    assert getattr(taken, "shutdown_timeout", 110) == 110  # older ones do not know it, and are not given it
    assert taken.module and taken.training_script == ENTRY[1] and taken.training_script_args == ["--max_steps=4"]


def test_without_variables_the_machines_are_in_a_file(tmp_path: Path) -> None:
    hosts = {"hosts": [f"algo-{i}" for i in (1, 2)], "current_host": "algo-1", "network_interface_name": "ens5"}
    (tmp_path / "resourceconfig.json").write_text(json.dumps(hosts), encoding="utf-8")
    machines = cluster({"SM_INPUT_CONFIG_DIR": str(tmp_path), "SM_NUM_GPUS": "0"})
    assert machines == Cluster(("algo-1", "algo-2"), "algo-1", "ens5", 1)
    assert "--nproc_per_node=1" in command(machines, []) and "--nnodes=2" in command(machines, [])


def test_one_process_needs_no_launcher_and_older_notes_name_their_script(tmp_path: Path) -> None:
    machines = cluster({"SM_INPUT_CONFIG_DIR": str(tmp_path), "SM_NUM_GPUS": "1"})
    assert command(machines, []) == [sys.executable, *ENTRY]
    assert command(machines, ["--fp16"], ["entry.py"]) == [sys.executable, "entry.py", "--fp16"]


@pytest.mark.parametrize(
    "wrong", [{"SM_HOSTS": "algo-1"}, {"SM_HOSTS": '["a"]', "SM_CURRENT_HOST": "b"}, {"SM_NUM_GPUS": "many"}]
)
def test_variables_that_make_no_sense(wrong: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="SM_HOSTS"):
        cluster({"SM_INPUT_CONFIG_DIR": str(tmp_path), "SM_NUM_GPUS": "1", **wrong})
