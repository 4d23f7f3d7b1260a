"""The run folder: who may write to it, and what is left of a run that was killed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from resonance.errors import RunFolderError
from resonance.model.checkpoints import COMPLETE_FILE, complete_steps, mark_complete, rotate, set_aside_damaged
from resonance.model.runs import RunFolder, claim, containing, read_events

HOLD = """
import sys
from pathlib import Path
from resonance.model.runs import claim
with claim(Path(sys.argv[1]), resume=False):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def checkpoint(run: Path, step: int, *, complete: bool = True) -> Path:
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"w" * 100)
    if complete:
        mark_complete(folder)
    return folder


def refused(path: Path, *, resume: bool = False) -> str:
    with pytest.raises(RunFolderError) as error, claim(path, resume=resume):
        pass
    assert str(path) in str(error.value) and "--output_dir" in str(error.value)
    return str(error.value)


def test_a_new_folder_is_made_and_can_be_claimed_again_after_release(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "语音 run"
    for _again in range(2):
        with claim(path, resume=False) as run:
            assert run.path.is_dir() and run.latest_checkpoint() is None and run.result is None


def test_a_training_that_failed_gives_the_folder_back_also_in_the_same_process(tmp_path: Path) -> None:
    with pytest.raises(KeyError) as kept, claim(tmp_path, resume=False):
        raise KeyError  # the traceback, which somebody may keep, refers to everything in the block
    with claim(tmp_path, resume=False):
        assert "Another training" in refused(tmp_path)
    assert kept.tb is not None


def test_a_folder_that_another_process_trains_into_is_refused_until_that_one_is_gone(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None and holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "claimed\n"
        for resume in (False, True):
            assert "Another training" in refused(tmp_path, resume=resume)
        holder.kill()  # no time to clean up: the lock must go with the process
    with claim(tmp_path, resume=False):
        pass


def test_a_finished_run_is_never_overwritten(tmp_path: Path) -> None:
    result = tmp_path / "adapter"
    result.mkdir()
    (result / "resonance.json").write_text("{}")
    assert "finished" in refused(tmp_path)
    with claim(tmp_path, resume=True) as run:
        assert run.result == result


def test_an_unfinished_run_is_continued_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    assert "no checkpoint yet" in refused(tmp_path)
    checkpoint(tmp_path, 40)
    assert "checkpoint-40" in refused(tmp_path) and "--resume" in refused(tmp_path)
    with claim(tmp_path, resume=True) as run:
        assert run.latest_checkpoint() == tmp_path / "checkpoints" / "checkpoint-40"


def test_a_file_where_the_folder_should_be_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("notes")
    assert "cannot be written" in refused(path)
    assert path.read_text() == "notes"
    refused(path / "below")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in refused(tmp_path)
    tmp_path.chmod(0o700)


def test_the_latest_complete_checkpoint_is_resumed_whatever_lies_beside_it(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for step in (8, 100, 20):  # by number, not by name
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 300, complete=False)  # a kill while it was written
    (tmp_path / "checkpoints" / "checkpoint-best").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-900").write_text("a file")
    assert run.latest_checkpoint() == tmp_path / "checkpoints" / "checkpoint-100"


@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_checkpoint_that_lost_a_part_after_it_was_complete_is_not_resumed(tmp_path: Path, damage: str) -> None:
    checkpoint(tmp_path, 10)
    weights = checkpoint(tmp_path, 20) / "weights.safetensors"
    if damage == "cut":
        weights.write_bytes(b"w" * 50)
    else:
        weights.unlink()
    assert RunFolder(tmp_path).latest_checkpoint() == tmp_path / "checkpoints" / "checkpoint-10"


def test_a_complete_checkpoint_lists_all_its_files(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 5, complete=False)
    (folder / "rng").mkdir()
    (folder / "rng" / "state.pth").write_bytes(b"12345")
    mark_complete(folder)
    listed = json.loads((folder / COMPLETE_FILE).read_text())
    assert {name: entry["bytes"] for name, entry in listed.items()} == {"rng/state.pth": 5, "weights.safetensors": 100}
    assert listed["rng/state.pth"]["sha256"] == hashlib.sha256(b"12345").hexdigest()
    mark_complete(folder)
    assert json.loads((folder / COMPLETE_FILE).read_text()) == listed


def test_a_checkpoint_whose_bytes_have_changed_is_set_aside_for_the_one_before(tmp_path: Path) -> None:
    folders = {step: checkpoint(tmp_path, step) for step in (5, 20, 100)}
    for step in (20, 100):
        (folders[step] / "weights.safetensors").write_bytes(b"v" + b"w" * 99)  # as long as before
    run = RunFolder(tmp_path)
    assert run.latest_checkpoint() == folders[100]  # sizes alone do not show it
    found = list(set_aside_damaged(run.checkpoints))
    assert found == [(folders[100], "weights.safetensors"), (folders[20], "weights.safetensors")]
    assert run.latest_checkpoint() == folders[5] and all(folder.is_dir() for folder in folders.values())
    assert list(set_aside_damaged(run.checkpoints)) == []


def test_a_checkpoint_of_an_earlier_version_with_sizes_only_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 5, complete=False)
    (folder / COMPLETE_FILE).write_text(json.dumps({"weights.safetensors": 100}))
    assert list(set_aside_damaged(RunFolder(tmp_path).checkpoints)) == []
    assert RunFolder(tmp_path).latest_checkpoint() == folder


def test_a_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert [row["step"] for row in read_events(path)] == [1, 2]


def test_a_run_is_found_from_its_folder_and_from_its_result(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "adapter").mkdir()
    assert containing(tmp_path) == containing(tmp_path / "adapter") == RunFolder(tmp_path)
    assert containing(tmp_path / "adapter" / "deeper") is None


def test_old_checkpoints_are_deleted_and_torn_ones_never_count(tmp_path: Path) -> None:
    for step in (20, 60, 80, 85):
        checkpoint(tmp_path, step)
    torn = checkpoint(tmp_path, 100, complete=False)  # left by a kill, from before the run went back to 80
    folders = tmp_path / "checkpoints"
    rotate(folders, 2, [folders / "checkpoint-85", folders / "checkpoint-20"])  # the newest and the best
    assert complete_steps(folders) == [20, 85] and torn.is_dir()
    rotate(folders, 1, [folders / "checkpoint-85"])
    assert complete_steps(folders) == [85]
    rotate(folders, None, [])
    assert complete_steps(folders) == [85]
