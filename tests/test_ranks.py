"""A process knows its place among those that train together, whoever started them."""

from __future__ import annotations

import pytest

from resonance.cli import run
from resonance.errors import ConfigError
from resonance.ranks import Ranks, first_host, meeting_point, ranks

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_torchrun_and_its_like_are_believed() -> None:
    assert ranks(TORCHRUN) == Ranks(5, 8, 1, restarts=2, launched=True)
    assert meeting_point(TORCHRUN) == {}
    # deepspeed's launcher and accelerate's set no restart count
    assert ranks({"RANK": "0", "WORLD_SIZE": "1"}) == Ranks(0, 1, 0, launched=True)


def test_srun_s_variables_are_translated() -> None:
    assert ranks(SRUN) == Ranks(9, 16, 1, launched=True)
    found = meeting_point(SRUN)
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["MASTER_ADDR"]) == ("9", "16", "1", "gpu07")
    other = meeting_point(SRUN | {"SLURM_PROCID": "0"})
    assert found["MASTER_PORT"] == other["MASTER_PORT"] and 1024 < int(found["MASTER_PORT"]) < 65536
    assert meeting_point(SRUN | {"MASTER_PORT": "1234"}).get("MASTER_PORT") is None  # the user's own stays


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"},  # inside sbatch, before srun
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_a_process_that_nobody_started_with_others_is_alone(environment: dict[str, str]) -> None:
    assert ranks(environment) == Ranks() and ranks(environment).main


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu1", "gpu1"),
        ("gpu[03-05,09],login1", "gpu03"),
        ("a1,a2", "a1"),
        ("n[7]", "n7"),
        ("rack2-[01-02]-ib", "rack2-01-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_one_process_on_each_disk_writes_what_a_run_is_continued_from() -> None:
    places = [Ranks(rank, 4, rank % 2, own_disk=own) for own in (False, True) for rank in range(4)]
    assert [place.writes for place in places] == [True, False, False, False, True, False, True, False]
    assert [place.main for place in places] == [True, False, False, False] * 2


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"])
@pytest.mark.parametrize("found", ["x", "-1", "1.5", "٣"])
def test_a_variable_that_is_no_number_is_named(name: str, found: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is “{found}”"):
        ranks({"RANK": "0", "WORLD_SIZE": "2", name: found})


def test_a_training_says_so_and_other_commands_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["train", "--train_file", "a.json", "--output_dir", "out"]) == ConfigError.exit_code
    assert capsys.readouterr().err.startswith("Error: RANK is “x” in the environment")
    assert run(["--help"]) == 0
