"""Resuming is exact in every way of sharding, and what a checkpoint exports is what the run itself exported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.train.resume_cases import CASES, KILLED_AFTER, STEPS, make_config, part
from vat_fast.checkpoint import MODEL_FILE, load_tensors
from vat_fast.train.checkpoints import CheckpointError
from vat_fast.train.export import export
from vat_fast.train.launch import Place
from vat_fast.train.log import read_log
from vat_fast.train.run import Run

SCRIPT = Path(__file__).with_name("resume_cases.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases on two ranks."""
    path = tmp_path_factory.mktemp("resume")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(path)],
        cwd=SCRIPT.parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return path


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_log(folder / "log.jsonl", "train")]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a policy folder; of the weights each tensor, since safetensors writes its header in any order."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MODEL_FILE}
    tensors, _ = load_tensors(folder / MODEL_FILE)
    return {**found, **{name: value.numpy().tobytes() for name, value in tensors.items()}}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_same_bit_for_bit(folder: Path, case: str) -> None:
    whole, parted = folder / case / "whole", folder / case / "parted"
    assert [step for step, *_ in losses(whole)] == list(range(1, STEPS + 1))
    assert losses(parted) == losses(whole)
    assert content(parted / "policy") == content(whole / "policy")


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_exports_what_the_run_exported(folder: Path, case: str, tmp_path: Path) -> None:
    """On one process without a group, from shards of two: bit for bit."""
    export(folder / case / "whole", tmp_path / "newest")
    assert content(tmp_path / "newest") == content(folder / case / "whole" / "policy")
    export(folder / case / "whole", tmp_path / "earlier", step=KILLED_AFTER)
    earlier, newest = content(tmp_path / "earlier"), content(tmp_path / "newest")
    assert earlier.keys() == newest.keys()
    assert earlier["head.fc2.weight"] != newest["head.fc2.weight"]


def test_stage_2_goes_on_with_another_number_of_ranks(folder: Path, one_rank: torch.device) -> None:
    part(folder, "stage 2", "alone")
    assert Run(make_config(folder, "stage 2", "alone"), Place(0, 0, 1, one_rank)).train() == 0
    ours, theirs = (losses(folder / "stage 2" / name) for name in ("alone", "whole"))
    assert ours[:KILLED_AFTER] == theirs[:KILLED_AFTER]
    assert [loss for _, loss, _ in ours] == pytest.approx([loss for _, loss, _ in theirs], rel=1e-4)


@pytest.mark.parametrize("case", ["stage 0", "stage 3"])
def test_the_others_say_that_they_cannot(folder: Path, one_rank: torch.device, case: str) -> None:
    with pytest.raises(CheckpointError, match="is of 2 ranks, this run has 1: their number can change"):
        Run(make_config(folder, case, "whole"), Place(0, 0, 1, one_rank))
