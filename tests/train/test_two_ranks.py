"""Two processes with 4 clips each train what one process with 8 trains."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from forked import Forked

RANKS = 2
SCRIPT = Path(__file__).with_name("training.py")
TOLERANCE = 1e-5
SECONDS_AT_MOST = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_ranks(folder: Path, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What rank 0 reports of a training by `RANKS` processes with these settings."""
    config, out = folder / "config.json", folder / "out.safetensors"
    config.write_text(json.dumps(given))
    place = {"WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    try:
        for rank in range(RANKS):
            environment = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = folder / f"rank{rank}.log"
            ranks.append(Forked([SCRIPT, config, out], out=log, environment=environment))
        codes = [rank.wait(timeout=SECONDS_AT_MOST) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0] * RANKS, (folder / "rank0.log").read_text()[-3000:] + (folder / "rank1.log").read_text()[-3000:]
    return load_file(out)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no distributed package")
def test_two_ranks_with_4_clips_equal_one_process_with_8_also_in_the_last_group(
    training: Any, uneven_labels: Callable[[int], Path], tiny_model: Path, tmp_path: Path
) -> None:
    # Groups of 8 and 3: in the second one rank has no clip of its own. Then the next epoch.
    labels = uneven_labels(11)
    steps = {"max_steps": 4, "save_steps": 2}
    alone = training.train(training.settings(labels, tiny_model, tmp_path / "alone", **steps))
    given = training.settings(labels, tiny_model, tmp_path / "ranks", **steps, per_device_train_batch_size=4)
    both = run_ranks(tmp_path, given)

    assert both["losses"].tolist() == pytest.approx(alone.losses, abs=TOLERANCE)
    assert both["gradient_norms"].tolist() == pytest.approx(alone.gradient_norms, abs=TOLERANCE)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(both[f"weights.{name}"], weight, rtol=0, atol=TOLERANCE, msg=name)

    # One log, and checkpoints that say they are complete only with what every rank wrote.
    rows = [json.loads(line) for line in (tmp_path / "ranks" / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    for step in (2, 4):
        files = json.loads((tmp_path / "ranks" / "checkpoints" / f"checkpoint-{step}" / "complete.json").read_text())
        assert {"rng_state_0.pth", "rng_state_1.pth", "trainer_state.json", "optimizer.pt"} <= files.keys()
