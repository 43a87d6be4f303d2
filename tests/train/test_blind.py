"""The blind policy's training: it learns what state and task tell, repeatably, and leaves what an evaluation loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.train import makers
from vat_fast.config import ConfigError
from vat_fast.rollout.blind import BlindPolicy
from vat_fast.train.blind import TRAINING_FILE, BlindSettings, main, train_blind
from vat_fast.train.data.episode import KeyMap
from vat_fast.train.data.pack import PackOptions, pack
from vat_fast.train.data.packed import PackedDataset
from vat_fast.train.data.targets import Samples, held_out

QUICK = {"steps": 300, "batch": 32, "lr": 3e-3, "hidden": 64, "chunk": 4, "holdout": 0.2, "ema": 0.97}


def learnable_demos(seed: int, count: int = 10, steps: int = 30) -> list[makers.Demo]:
    """Two tasks with the same states, which drift slowly, and opposite actions, which state and task decide."""
    begin = np.random.default_rng(seed).uniform(-1, 1, (count // 2, 8))
    demos = []
    for index, demo in enumerate(makers.make_demos(count, seed=seed, size=16, lengths=(steps,))):
        state = (begin[index // 2] + 0.01 * np.arange(steps)[:, None]).astype(np.float32)
        actions = np.empty((steps, 7), np.float32)
        actions[:, :6] = (1 if index % 2 else -1) * state[:, :6]
        actions[:, 6] = np.where(state[:, 6] > 0, 1, -1)
        demos.append(makers.Demo(demo.images, actions, state, demo.task))
    return demos


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    root = tmp_path_factory.mktemp("blind")
    out = []
    for seed in range(2):
        makers.write_rlds(root / f"libero_{seed}", learnable_demos(seed))
        pack([root / f"libero_{seed}"], root / f"p{seed}", PackOptions(tasks="libero_goal"), progress=False)
        out.append(str(root / f"p{seed}"))
    return tuple(out)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_it_learns_what_state_and_task_tell(folders: tuple[str, ...], tmp_path: Path) -> None:
    summary = train_blind(BlindSettings(folders, **QUICK), tmp_path, progress=False)
    # Guessing zero for the six dimensions of motion gives about 0.5.
    assert summary["train_l1"] < 0.1
    assert json.loads((tmp_path / TRAINING_FILE).read_text(encoding="utf-8")) == json.loads(json.dumps(summary))
    assert summary["conditions"]["torch"] == version("torch")
    policy, data = BlindPolicy.from_pretrained(tmp_path), PackedDataset(folders[0])
    np.testing.assert_array_equal(policy.statistics.action.q99, data.statistics.action.q99)
    # The figure of a dataset is the mean over its samples of what the loaded policy says of them.
    out = held_out([entry.name for entry in data.episodes], 0.2, 42)
    samples = Samples(data, 4, episodes=out)
    every = np.arange(len(samples))
    with torch.no_grad():
        said = policy(torch.from_numpy(samples.proprio(every)), torch.from_numpy(samples.task_id)).numpy()
    found = summary["held_out"][data.name]
    assert found["samples"] == len(samples) == 2 * 27
    assert found["l1"] == pytest.approx(np.abs(said - samples.actions(every)).mean(), rel=1e-5)
    assert summary["held_out_l1"] == pytest.approx(np.mean([part["l1"] for part in summary["held_out"].values()]))


def test_told_no_task_it_cannot_tell_the_tasks_apart(folders: tuple[str, ...], tmp_path: Path) -> None:
    summary = train_blind(BlindSettings(folders, task=False, **QUICK), tmp_path, progress=False)
    assert summary["train_l1"] > 0.2
    policy = BlindPolicy.from_pretrained(tmp_path)
    observation = {"state": np.linspace(-1, 1, 8, dtype=np.float32)}
    first, second = policy.predict([observation, observation], list(makers.TASKS))
    np.testing.assert_array_equal(first, second)


def test_the_seed_decides_the_weights(folders: tuple[str, ...], tmp_path: Path) -> None:
    def weights(name: str, **options: object) -> bytes:
        settings = BlindSettings(folders, **{**QUICK, "steps": 20, "proprio_noise": 0.1, **options})
        torch.rand(3)  # the global generator has no part in it
        train_blind(settings, tmp_path / name, progress=False)
        return (tmp_path / name / "blind.safetensors").read_bytes()

    first = weights("first")
    assert weights("again") == first
    assert weights("other", seed=1) != first
    assert weights("quiet", proprio_noise=0.0) != first
    assert weights("mixed", weights=(1.0, 3.0)) != first


def test_the_command_stores_how_chunks_are_executed(
    folders: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["--steps", "3", "--batch", "8", "--hidden", "16", "--chunk", "4", "--replan-every", "2"]
    assert main([folders[0], "--out", str(tmp_path), *short, "--holdout", "0"]) == 0
    assert "no episode held out" in capsys.readouterr().out
    config = BlindPolicy.from_pretrained(tmp_path).config
    assert (config.replan_every, config.temporal_ensembling, config.chunk_size, config.hidden) == (2, None, 4, 16)
    assert main([str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "is no packed dataset" in capsys.readouterr().err
    assert main([*folders, "--out", str(tmp_path), "--weights", "1"]) == 2
    assert "2 datasets need as many weights" in capsys.readouterr().err


def test_data_and_values_that_cannot_be(folders: tuple[str, ...], tmp_path: Path) -> None:
    makers.write_rlds(tmp_path / "libero_x", learnable_demos(3, count=2, steps=8))
    options = PackOptions(tasks="libero_goal", keys=KeyMap(state=()))
    pack([tmp_path / "libero_x"], tmp_path / "stateless", options, progress=False)
    with pytest.raises(ConfigError, match="stateless has no proprioception, and a blind policy reads nothing else"):
        train_blind(BlindSettings((str(tmp_path / "stateless"),)), tmp_path, progress=False)
    with pytest.raises(ConfigError, match="two datasets are called 'p0'"):
        train_blind(BlindSettings((folders[0], folders[0])), tmp_path, progress=False)
    for options, message in (
        ({"paths": ()}, "name at least one packed folder"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"proprio_noise": -1.0}, "proprio_noise must be at least 0, got -1.0"),
        ({"warmup": 1.0}, "warmup must be a fraction from 0 to below 1, got 1.0"),
        ({"ema": 1.0}, "ema must be above 0 and below 1, got 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            BlindSettings(**{"paths": ("a",), **options})
