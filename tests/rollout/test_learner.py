"""A learner that goes wrong, and the expert that shows the way from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from vat_fast.chunks import ChunkExecutor
from vat_fast.rollout.collect import CollectSettings
from vat_fast.rollout.demonstration import demonstrate
from vat_fast.rollout.experts import Expert
from vat_fast.rollout.experts.disturb import Disturbance
from vat_fast.rollout.geometry import SceneGeometry
from vat_fast.rollout.learner import Learner
from vat_fast.rollout.scene import Scene


class Sideways:
    """Moves to the left with a closed hand, whatever it sees; counts how often it looks."""

    looks = 0

    def new_executor(self) -> ChunkExecutor:
        return ChunkExecutor(8, 4)

    def predict(self, observations: Sequence[Mapping[str, Any]], task: str) -> NDArray[np.float32]:
        assert task == "pick up the cream cheese and place it in the basket"
        assert "agentview_image" in observations[0]
        self.looks += 1
        return np.tile(np.array([0, 0.6, 0, 0, 0, 0, 1], np.float32), (1, 8, 1))

    def to_robot(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        return actions


def test_the_expert_shows_the_way_from_where_the_learner_went(cheese_scene: Scene) -> None:
    policy = Sideways()
    rng = np.random.default_rng(0)
    demonstration = demonstrate(cheese_scene, 2, Disturbance(), rng, learner=Learner(policy, 12, 12))
    assert demonstration is not None
    assert policy.looks == 3
    usual = demonstrate(cheese_scene, 2, Disturbance(), np.random.default_rng(0))
    assert usual is not None
    # It starts 12 steps of up to 3 cm away from where demonstrations start, and opens the hand first.
    assert demonstration.robot["eef_pos"][0, 1] - usual.robot["eef_pos"][0, 1] > 0.06
    assert demonstration.actions[0, 6] == -1
    assert demonstration.robot["gripper_qpos"][0, 0] < usual.robot["gripper_qpos"][0, 0]


def test_a_held_object_is_no_place_to_take_over(cheese_scene: Scene) -> None:
    scene = cheese_scene
    scene.reset(0)
    scene.settle(10)
    geometry, held = SceneGeometry(scene.env), []
    for command in Expert(scene).commands():
        scene.step(command.action)
        held.append((command.phase, geometry.is_held("cream_cheese_1")))
        if command.phase == "carry":
            break
    assert held[-1] == ("carry", True)
    assert not any(is_held for phase, is_held in held if phase in ("approach", "descend"))


def test_settings_that_cannot_be(simulator: None) -> None:
    with pytest.raises(ValueError, match="at least and at most so many steps, got 5 and 2"):
        CollectSettings("object", (0,), learner="x", learner_steps=(5, 2))
