"""The blind baseline: an evaluation drives it like any policy, and it learns from the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.rollout.toys import NAMES, ToyScenes, statistics
from vat_fast.actions import Statistics
from vat_fast.config import ConfigError
from vat_fast.rollout.blind import BlindConfig, BlindPolicy
from vat_fast.rollout.drivers import Driver
from vat_fast.rollout.records import EpisodeKey
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.tasks import TaskError, TaskTable

TASKS = TaskTable({name: index for index, name in enumerate(NAMES)})
SETTINGS = EvaluationSettings("toy", (0,), max_steps=10)
STATISTICS = Statistics("toy", statistics(7, True, 0), statistics(8, False, 1))


def make(**options: Any) -> BlindPolicy:
    torch.manual_seed(0)
    return BlindPolicy(BlindConfig(TASKS, **{"chunk_size": 4, "hidden": 32, **options}), STATISTICS).eval()


def test_it_reads_state_and_task_and_no_image() -> None:
    policy, scene = make(), ToyScenes()(0)
    scene.reset(0)
    near = scene.observe()
    scene.reset(1)
    far = scene.observe()
    a, b, c = policy.predict([near, far, near], [NAMES[0], NAMES[0], NAMES[1]])
    assert a.shape == (4, 7)
    assert np.abs(a - b).max() > 1e-4
    assert np.abs(a - c).max() > 1e-4
    black = {**near, "agentview_image": 0 * near["agentview_image"]}
    np.testing.assert_array_equal(policy.predict([black], NAMES[0]), policy.predict([{"state": near["state"]}], 0))
    assert policy.config.cameras == ()
    with pytest.raises(TaskError, match="unknown task 'dance'"):
        policy.task_id("dance")


def test_execution_follows_its_configuration() -> None:
    chunk = np.zeros((4, 7), np.float32)
    assert Driver(make(), EpisodeKey(0, 0), SETTINGS).actions(chunk).shape == (4, 7)
    assert Driver(make(replan_every=2), EpisodeKey(0, 0), SETTINGS).actions(chunk).shape == (2, 7)
    assert Driver(make(temporal_ensembling=0.1), EpisodeKey(0, 0), SETTINGS).actions(chunk).shape == (1, 7)
    # Model output 0 in the last dimension is "closed", +1 for the robot.
    assert (Driver(make(), EpisodeKey(0, 0), SETTINGS).actions(chunk)[:, -1] == 1).all()


def test_it_learns_a_batch() -> None:
    policy = make()
    rng = torch.Generator().manual_seed(0)
    batch = {
        "proprio": torch.randn(16, 8, generator=rng),
        "task_id": torch.arange(16) % 3,
        "actions": torch.randn(16, 4, 7, generator=rng).clamp(-1, 1),
        "pixels": torch.zeros(16, 2, 3, 8, 8),
    }
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    first = policy.loss(batch).item()
    for _ in range(80):
        optimizer.zero_grad()
        policy.loss(batch).backward()
        optimizer.step()
    assert policy.loss(batch).item() < 0.3 * first
    with pytest.raises(ValueError, match="the batch has no proprio; it has task_id, actions"):
        policy.loss({name: batch[name] for name in ("task_id", "actions")})


def test_saved_and_loaded_it_predicts_the_same(tmp_path: Path) -> None:
    policy = make(temporal_ensembling=0.5)
    policy.save_pretrained(tmp_path)
    again = BlindPolicy.from_pretrained(tmp_path)
    assert again.config == policy.config
    scene = ToyScenes()(2)
    scene.reset(5)
    observation = scene.observe()
    np.testing.assert_array_equal(again.predict([observation], 2), policy.predict([observation], 2))
    chunk = policy.predict([observation], 2)[0]
    np.testing.assert_array_equal(again.to_robot(chunk), policy.to_robot(chunk))


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="reads 8 numbers of proprio, the statistics have none"):
        BlindPolicy(BlindConfig(TASKS), Statistics("toy", STATISTICS.action))
    with pytest.raises(ConfigError, match="actions have 14 numbers, the statistics 7"):
        make(action_dim=14)
    with pytest.raises(ConfigError, match="hidden must be an integer of at least 1, got 0"):
        make(hidden=0)
    with pytest.raises(ConfigError, match="replan_every must be 1 to the chunk size 4, got 5"):
        make(replan_every=5)
    with pytest.raises(ConfigError, match="unknown field 'size'"):
        BlindConfig.from_dict({"tasks": {"a": 0}, "size": 3})
