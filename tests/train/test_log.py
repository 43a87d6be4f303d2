"""The log survives kills, and the speedometer adds up."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vat_fast.config import ConfigError
from vat_fast.train.log import LOG_FILE, RunLog, Speedometer, max_over_ranks, memory_bytes, peak_flops, read_log

CPU = torch.device("cpu")


def test_resume_repeats_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, total=40)
    for step in (10, 20, 30):
        log.write(step, "train", {"loss": 1 / step, "l1_per_step": [0.1, 0.2], "grad_norm": None, "bad": float("nan")})
    # Killed in the middle of a line: the file is never closed.
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 40, "ki')
    assert [record["step"] for record in read_log(tmp_path / LOG_FILE)] == [10, 20, 30]
    again = RunLog(tmp_path, total=40, start=20)
    again.write(30, "train", {"loss": 0.5})
    again.write(30, "validation", {"l1": 0.25})
    again.close()
    records = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [(r["step"], r["kind"]) for r in records] == [
        (10, "train"),
        (20, "train"),
        (30, "train"),
        (30, "validation"),
    ]
    assert records[0]["bad"] == "nan"
    assert records[2]["loss"] == 0.5
    assert read_log(tmp_path / LOG_FILE, "validation")[0]["l1"] == 0.25
    lines = capsys.readouterr().err.splitlines()
    assert "step 30/40 (75 %" in lines[-1]
    assert "left) validation: l1 0.25" in lines[-1]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "run", total=4, is_main=False, tensorboard=True)
    log.advance(1)
    log.write(1, "train", {"loss": 1.0})
    log.say("hello")
    log.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().err == ""


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    log = RunLog(tmp_path, total=4, tensorboard=True)
    log.write(2, "train", {"loss": 0.5, "l1_per_step": [0.1, 0.2], "mfu": None})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/l1_per_step/0", "train/l1_per_step/1"}
    assert events.Scalars("train/loss")[0].step == 2


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        RunLog(tmp_path, total=4, wandb="project")
    real = builtins.__import__

    def no_tensorboard(name: str, *args: Any, **kwargs: Any) -> Any:
        if "tensorboard" in name:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_tensorboard)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        RunLog(tmp_path, total=4, tensorboard=True)


def test_wandb_goes_on_in_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which needs an account."""
    started: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []

    class Run:
        def log(self, scalars: dict[str, float], step: int) -> None:
            logged.append((step, scalars))

        def finish(self) -> None:
            logged.append((-1, {}))

    class Package:
        @staticmethod
        def init(**options: Any) -> Run:
            started.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Package)
    for start in (0, 1):
        log = RunLog(tmp_path, total=4, start=start, wandb="vat", config={"seed": 42})
        log.write(start + 1, "train", {"loss": 0.5})
        log.close()
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["project"] == "vat"
    assert started[0]["config"] == {"seed": 42}
    assert logged[0] == (1, {"train/loss": 0.5})
    assert logged[1] == (-1, {})


def test_speedometer() -> None:
    speed = Speedometer(flops_per_sample=1e9, peak_flops=1e12, world_size=1, device=CPU)
    for _ in range(4):
        speed.add({"data": 0.1, "forward": 0.9}, samples=8)
    figures = speed.read()
    assert figures["samples_per_second"] == pytest.approx(8)
    assert figures["step_seconds"] == pytest.approx(1)
    assert figures["forward_seconds"] == pytest.approx(0.9)
    assert figures["data_share"] == pytest.approx(0.1)
    assert figures["mfu"] == pytest.approx(8e9 / 1e12)
    assert figures["memory_gib"] == pytest.approx(memory_bytes(CPU) / 2**30, rel=0.5)
    with pytest.raises(ValueError, match="no step"):
        speed.read()


def test_device_figures() -> None:
    block = torch.ones(50_000_000)
    assert memory_bytes(CPU) > block.nbytes
    rate = peak_flops(CPU, torch.float32)
    assert rate is not None
    assert 1e8 < rate < 1e14
    assert max_over_ranks({"a": 1.0, "b": 2.5}, CPU) == {"a": 1.0, "b": 2.5}
