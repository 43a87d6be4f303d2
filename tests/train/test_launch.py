"""The end of a rank, asked for or forced: a stop that saves, one sentence for what a user can put right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.train.test_run import make_config
from vat_fast.config import ConfigError
from vat_fast.train import launch
from vat_fast.train.checkpoints import Checkpoints
from vat_fast.train.launch import Place
from vat_fast.train.log import read_log
from vat_fast.train.run import Run

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def command(folder: Path, *settings: str) -> list[str]:
    """A training on this process's Python alone, without a launcher."""
    changes = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "vat_fast.train.main", "--config", str(folder / "config.yaml"), *changes]


def write_config(folder: Path) -> None:
    (folder / "config.yaml").write_text(make_config(folder, "run").to_yaml())


def test_a_signal_stops_and_saves(tmp_path: Path) -> None:
    write_config(tmp_path)
    settings = ("train.steps=100000", "checkpoint.every=null", "validate.every=null", "data.workers=1")
    process = subprocess.Popen(
        command(tmp_path, *settings), cwd=REPOSITORY, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    log, end = tmp_path / "run" / "log.jsonl", time.monotonic() + 400
    while not (log.exists() and len(read_log(log, "train")) >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=300)
    assert process.returncode == launch.STOPPED, text
    newest = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert newest is not None
    step = int(newest.name.removeprefix("step-"))
    assert step == read_log(log, "train")[-1]["step"]
    assert f"asked to stop: step {step} is saved, the same command goes on from there" in text
    assert "terminate called" not in text
    assert "Traceback" not in text


def test_what_a_user_can_put_right_is_one_sentence(tmp_path: Path) -> None:
    """Data that do not fit the model: known on the ranks only, after they have joined."""
    write_config(tmp_path)
    done = subprocess.run(
        command(tmp_path, "model.options.num_views=3"),
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == launch.REFUSED, done.stderr
    own = [line for line in done.stderr.splitlines() if line.startswith("train: ")]
    assert len(own) == 1
    assert own[0].startswith("train: rank 0: the model sees 3 views, ")
    assert "Traceback" not in done.stderr
    assert "terminate called" not in done.stderr


def test_a_number_of_ranks_that_does_not_divide_the_batch(tmp_path: Path, one_rank: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"^train\.global_batch 8 is not a multiple of the 3 ranks$"):
        Run(make_config(tmp_path, "run"), Place(0, 0, 3, one_rank))
    assert not list(tmp_path.iterdir())  # before anything is made


def test_a_failed_run_is_closed(tmp_path: Path, one_rank: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(make_config(tmp_path, "run", steps=4), Place(0, 0, 1, one_rank))
    closed = []
    monkeypatch.setattr(run.data.train, "close", lambda: closed.append("loader"))
    monkeypatch.setattr(run.trainer.engine, "destroy", lambda: closed.append("engine"))

    def broken(loader: object) -> None:
        raise RuntimeError("no step today")

    monkeypatch.setattr(run.trainer, "train_step", broken)
    with pytest.raises(RuntimeError, match="no step today"):
        run.train()
    assert closed == ["loader", "engine"]
