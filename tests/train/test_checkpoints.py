"""What counts as a checkpoint, which are kept, and what is refused; the engine is a small one that writes one file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vat_fast.files import write_text
from vat_fast.train.checkpoints import MANIFEST, CheckpointError, Checkpoints, read_manifest

FILE = "mp_rank_00_model_states.pt"


class Engine:
    """What `Checkpoints` uses of DeepSpeed's engine, around one weight."""

    global_rank = 0

    def __init__(self, stage: int = 1, world_size: int = 1, bf16: bool = False) -> None:
        self.module = nn.Linear(300, 40)
        self.checkpoint_engine: Any = self
        self.stage, self.world_size, self.bf16 = stage, world_size, bf16

    def zero_optimization_stage(self) -> int:
        return self.stage

    def bfloat16_enabled(self) -> bool:
        return self.bf16

    def save(self, content: Any, path: str) -> None:
        torch.save(content, path)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        self.checkpoint_engine.save(self.module.state_dict(), f"{folder}/{tag}/{FILE}")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str, dict[str, Any]]:
        # As DeepSpeed does.
        self.module.load_state_dict(torch.load(f"{folder}/{tag}/{FILE}", weights_only=False))
        return folder, {}


@pytest.fixture
def engine() -> Engine:
    return Engine()


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_round_trip(tmp_path: Path, engine: Engine) -> None:
    checkpoints = Checkpoints(tmp_path)
    average = {"weight": torch.rand(3, 2)}
    path = checkpoints.save(engine, 7, {"loader": {"epoch": 2}}, average)
    expected = torch.rand(4)
    assert path == tmp_path / "step-00000007" == checkpoints.newest()
    assert read_manifest(path)["files"].keys() == {FILE, "rank-0.safetensors", "run.json"}
    other = Engine()
    state, tensors = checkpoints.load(other, path)
    assert state == {"step": 7, "loader": {"epoch": 2}}
    assert torch.equal(tensors["weight"], average["weight"])
    assert torch.equal(other.module.weight, engine.module.weight)
    assert torch.equal(torch.rand(4), expected)


def test_what_is_half_written_does_not_count(tmp_path: Path, engine: Engine) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (1, 2, 3, 4):
        checkpoints.save(engine, step, {}, {})
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000004.partial")
    (tmp_path / "step-00000003" / MANIFEST).unlink()
    os.truncate(tmp_path / "step-00000002" / FILE, 100)
    assert checkpoints.newest() == tmp_path / "step-00000001"
    for step, message in ((4, "no whole checkpoint"), (3, "no whole checkpoint"), (2, "no whole checkpoint")):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(engine, tmp_path / f"step-{step:08d}")
    (tmp_path / "notes").mkdir()
    # The next save clears up, and leaves alone what is not its own.
    checkpoints.save(engine, 5, {}, {})
    assert names(checkpoints) == ["notes", "step-00000001", "step-00000005"]


@pytest.mark.parametrize("file", [FILE, "rank-0.safetensors", "run.json"])
def test_a_damaged_file_is_found(tmp_path: Path, engine: Engine, file: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(engine, 1, {"more": "text"}, {"a": torch.ones(9)})
    flip(path / file)
    before = engine.module.weight.clone()
    with pytest.raises(CheckpointError, match=f"step-00000001 is damaged; remove it.*: rank 0: {file} is not what was"):
        checkpoints.load(engine, path)
    assert torch.equal(engine.module.weight, before)


def test_which_are_kept(tmp_path: Path, engine: Engine) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=3)
    for step in range(1, 9):
        checkpoints.save(engine, step, {}, {})
    assert names(checkpoints) == ["step-00000003", "step-00000006", "step-00000007", "step-00000008"]
    checkpoints.save(engine, 8, {"again": True}, {})
    state, _ = checkpoints.load(engine, tmp_path / "step-00000008")
    assert state["again"]
    only = Checkpoints(tmp_path, keep_last=0)
    only.save(engine, 9, {}, {})
    assert only.newest() == tmp_path / "step-00000009"


def test_a_save_that_fails_leaves_the_older_ones(
    tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(engine, 1, {}, {})
    save = engine.save

    def full(content: Any, path: str) -> None:
        save(content, path)
        raise OSError(28, "No space left on device")

    def cut(content: Any, path: str) -> None:
        save(content, path)
        os.truncate(path, os.path.getsize(path) // 2)

    broken: tuple[tuple[Callable[[Any, str], None], str], ...] = (
        (full, "step 2 could not be written: rank 0: .*No space left on device"),
        (cut, f"step 2 could not be read back: rank 0: {FILE} is cut short"),
    )
    for writer, message in broken:
        monkeypatch.setattr(engine, "save", writer)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.save(engine, 2, {}, {})
        assert names(checkpoints) == ["step-00000001"]
    monkeypatch.undo()
    checkpoints.save(engine, 2, {}, {})
    assert names(checkpoints) == ["step-00000001", "step-00000002"]


def test_what_an_engine_cannot_take(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    of_one = checkpoints.save(Engine(1), 1, {}, {})
    checkpoints.load(Engine(2), of_one)
    of_three = checkpoints.save(Engine(3), 2, {}, {})
    for path, engine, message in (
        (of_one, Engine(1, bf16=True), "has fp32 parameters, this run bf16: resume with the train.precision it had"),
        (of_one, Engine(3), "is of ZeRO stage 1, this run of stage 3: only 1 and 2 can be exchanged"),
        (of_one, Engine(0), "is of ZeRO stage 1, this run of stage 0: only 1 and 2 can be exchanged"),
        (of_three, Engine(3, world_size=2), "is of 1 ranks, this run has 2: their number can change with ZeRO-1 and 2"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoints.load(engine, path)


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_strangers_file_runs_nothing(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its manifest is the stranger's too, and fits."""
    checkpoints, harm = Checkpoints(tmp_path / "checkpoints"), tmp_path / "harm"
    state = {**engine.module.state_dict(), "extra": Attack(harm)}
    monkeypatch.setattr(engine.module, "state_dict", lambda: state)
    path = checkpoints.save(engine, 1, {}, {})
    other = Engine()
    with pytest.raises(
        CheckpointError, match=f"was not loaded: rank 0: {FILE} names posix.mkdir, which could run code"
    ):
        checkpoints.load(other, path)
    # The check before is not what the safety rests on: the load itself refuses too.
    monkeypatch.setattr("vat_fast.train.checkpoints.check_data_only", lambda path: None)
    with pytest.raises(CheckpointError, match="was not loaded: a file holds more than data"):
        checkpoints.load(other, path)
    assert not harm.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    torch.load(path / FILE, weights_only=False)
    assert harm.exists()  # it would have


def test_a_manifest_that_is_none(tmp_path: Path, engine: Engine) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(engine, 1, {}, {})
    manifest = json.loads((path / MANIFEST).read_text())
    for text in ("", "[]", "{}", json.dumps({**manifest, "files": {**manifest["files"], "more": {"size": 1}}})):
        write_text(path / MANIFEST, text)
        assert checkpoints.newest() is None
