"""What else an engine is asked to do: keep state in the host's memory, and run compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.test_loop import make_config
from vat_fast.train.build import build_model
from vat_fast.train.config import Config
from vat_fast.train.datasets import open_data, prepare_paths
from vat_fast.train.loop import Trainer


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed synthetic demonstrations."""
    folder = tmp_path_factory.mktemp("data")
    return prepare_paths(make_config(folder, {}, synthetic={"demos": 4, "steps": 14, "image_size": 32}), True)[0]


def losses(packed: Path, device: torch.device, train: dict[str, Any], **zero: Any) -> list[float]:
    """Of a few steps."""
    options = {"steps": 4, "global_batch": 8, "warmup": 0.0, **train}
    config: Config = make_config(packed.parent, options, paths=[str(packed)])
    config = dataclasses.replace(config, zero=dataclasses.replace(config.zero, **zero))
    vat = build_model(config)
    data = open_data(config, vat.config, [packed], 0, 1)
    trainer = Trainer(config, vat, 4, device, 0)
    return [float(trainer.train_step(data.train).loss) for _ in range(4)]


@pytest.mark.parametrize(("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_offloaded_state_trains_the_same(
    demonstrations: Path, one_rank: torch.device, stage: int, offload: str
) -> None:
    """On a CPU host and device are one memory, but DeepSpeed's code for it is its own."""
    plain = losses(demonstrations, one_rank, {}, stage=stage)
    assert losses(demonstrations, one_rank, {}, stage=stage, offload=offload) == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < plain[0]


def test_compiled_training_trains_the_same(demonstrations: Path, one_rank: torch.device) -> None:
    model = {"depth": 2}
    plain = losses(demonstrations, one_rank, {"model": dict(model)})
    torch.compiler.reset()
    compiled = losses(demonstrations, one_rank, {"model": dict(model), "compile": True})
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    assert frames >= 1  # something was compiled indeed
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert plain[-1] < plain[0]
