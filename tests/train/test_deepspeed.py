"""The real `deepspeed` command on two CPU ranks: killed, stopped, resumed otherwise sharded, exported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vat_fast import Policy
from vat_fast.train import launch
from vat_fast.train.checkpoints import Checkpoints
from vat_fast.train.log import read_log

REPOSITORY = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("deepspeed")
CONFIG = """\
output: {folder}/whole
model:
  preset: vit-tiny
  weights: random
  options: {{image_size: 32, depth: 2, num_tasks: 2}}
data:
  paths: [{folder}/demonstrations]
  packed: {folder}/packed
  synthetic: {{demos: 4, steps: 16, image_size: 32}}
  holdout: 0.0
  workers: 0
train: {{steps: 6, global_batch: 8, lr: 1e-3, precision: fp32, threads: 1, ema: 0.9, clip: 1.0}}
log: {{every: 1, tensorboard: false}}
validate: {{every: null}}
checkpoint: {{every: 2}}
"""

pytestmark = pytest.mark.skipif(not COMMAND.exists(), reason="there is no deepspeed command beside this Python")


def start(folder: Path, output: str, *settings: str, accident: str | None = None, ranks: int = 2) -> subprocess.Popen:
    """`deepspeed` in a session of its own, by which its processes are found again."""
    script = "train/main.py" if accident is None else "tests/train/faults.py"
    changes = [word for setting in (f"output={folder / output}", *settings) for word in ("--set", setting)]
    free_port = str(20_000 + os.getpid() % 20_000)
    command = [str(COMMAND), "--num_gpus", str(ranks), "--master_port", free_port, script]
    command += [accident] if accident else []
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (folder / f"{output}.txt").open("a") as text:
        return subprocess.Popen(
            [*command, "--config", str(folder / "config.yaml"), *changes],
            cwd=REPOSITORY,
            env=environment,
            stdout=text,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, seconds: float = 150) -> int:
    """Its exit status; nothing of it may be left."""
    try:
        status = process.wait(seconds)
        wait_for(lambda: not alive(process.pid), 20)
    finally:
        for pid in alive(process.pid):
            os.kill(pid, signal.SIGKILL)
    return status


def alive(session: int) -> list[int]:
    """The processes of a session, but for zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(owner) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def losses(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(folder / "log.jsonl", "train")}


def saved(folder: Path) -> list[str]:
    return [path.name for path in Checkpoints(folder / "checkpoints").whole()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations, and the run `whole` that nothing disturbed."""
    path = tmp_path_factory.mktemp("deepspeed")
    (path / "config.yaml").write_text(CONFIG.format(folder=path))
    assert finish(start(path, "whole")) == 0, (path / "whole.txt").read_text()[-2000:]
    return path


def test_a_whole_run_exports_a_policy(folder: Path) -> None:
    assert list(losses(folder / "whole")) == [1, 2, 3, 4, 5, 6]
    assert saved(folder / "whole") == ["step-00000004", "step-00000006"]
    policy = Policy.from_pretrained(folder / "whole" / "policy")
    cameras = dict.fromkeys(policy.config.cameras, np.zeros((32, 32, 3), np.uint8))
    actions = policy.act(cameras, 1)
    assert actions.shape == (8, 7)
    assert np.isfinite(actions).all()


def test_killed_while_saving_then_resumed_with_zero_2(folder: Path) -> None:
    """The half-written checkpoint does not count; what follows is bit for bit what would have been."""
    assert finish(start(folder, "killed", accident="kill-in-save-4")) != 0
    assert saved(folder / "killed") == ["step-00000002"]
    assert (folder / "killed" / "checkpoints" / "step-00000004.partial").is_dir()
    assert finish(start(folder, "killed", "zero.stage=2")) == 0, (folder / "killed.txt").read_text()[-2000:]
    assert losses(folder / "killed") == losses(folder / "whole")
    assert not list((folder / "killed" / "checkpoints").glob("*.partial"))


def test_a_full_disk_then_resumed_on_one_rank(folder: Path) -> None:
    """A save that fails on one rank leaves the older checkpoint, and training goes on where that is asked for."""
    status = finish(start(folder, "full", "checkpoint.on_failure=continue", accident="full-disk-3"))
    text = (folder / "full.txt").read_text()
    assert status == 0, text[-2000:]
    assert "no checkpoint of step 4, training goes on: step 4 could not be written: rank 1: " in text
    assert saved(folder / "full") == ["step-00000002"]
    assert losses(folder / "full") == losses(folder / "whole")
    assert finish(start(folder, "full", ranks=1)) == 0, (folder / "full.txt").read_text()[-2000:]
    whole, other = losses(folder / "whole"), losses(folder / "full")
    assert other[2] == whole[2]
    for step in (3, 4, 5, 6):
        assert other[step] == pytest.approx(whole[step], rel=1e-4)
    assert saved(folder / "full") == ["step-00000004", "step-00000006"]


def test_killed_in_a_step(folder: Path) -> None:
    assert finish(start(folder, "step", accident="kill-in-step-4")) != 0
    assert saved(folder / "step") == ["step-00000002"]
    assert list(losses(folder / "step"))[-1] == 3


def test_the_end_of_the_command_is_a_stop_that_saves(folder: Path) -> None:
    process = start(folder, "stopped", "train.steps=100000", "checkpoint.every=null")
    log = folder / "stopped" / "log.jsonl"
    wait_for(lambda: log.exists() and len(losses(folder / "stopped")) >= 2, 120)
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert len(saved(folder / "stopped")) == 1
    assert f"return code = {launch.STOPPED}" in (folder / "stopped.txt").read_text()
