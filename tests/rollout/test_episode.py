"""Real LIBERO scenes: evaluating in parallel with rendering on demand is the plain loop, bit for bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rollout.toys import make_policy
from vat_fast.policy import Policy
from vat_fast.rollout.evaluate import EvaluationResult
from vat_fast.rollout.install_check import SimulatorError, check_simulator
from vat_fast.rollout.libero import LiberoScenes, evaluate_libero, libero_settings
from vat_fast.rollout.messages import Finished
from vat_fast.rollout.plain import plain_episode
from vat_fast.rollout.records import EpisodeKey, digest
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.rollout.suites import max_steps, suite_name, task_names
from vat_fast.rollout.video import ReplayError, replay, write_video
from vat_fast.tasks import RELEASED_TABLES

try:
    check_simulator()
except SimulatorError as error:
    pytest.skip(f"no LIBERO here: {error}", allow_module_level=True)

SUITE, TASK, STATES = "libero_object", 3, (2, 0)
SIZE = 64


@dataclass
class Both:
    """The same episodes by the plain loop and by `evaluate`."""

    settings: EvaluationSettings
    plain: dict[EpisodeKey, Finished]
    states: dict[EpisodeKey, Any]
    result: EvaluationResult
    folder: Path


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("evaluation")
    settings = libero_settings(
        SUITE, (TASK,), init_states=STATES, step_limit=18, settling_steps=2, image_size=SIZE, render="fast"
    )
    policy = small_policy()
    plain, states = {}, {}
    # One scene for both episodes, and in the other order than below: what was played before must not matter.
    scene = LiberoScenes(SUITE, SIZE, "fast")(TASK)
    for key in reversed(settings.episodes):
        plain[key] = plain_episode(policy, scene, scene.task_name, key, settings)
        states[key] = scene.sim_state()
    scene.close()
    result = evaluate_libero(policy, settings, folder=folder, processes=2, progress=False)
    return Both(settings, plain, states, result, folder)


def small_policy() -> Policy:
    return make_policy(task_names(SUITE), size=48)


def test_same_actions_and_outcomes_as_the_plain_loop(both: Both) -> None:
    assert [record.key for record in both.result.records] == both.settings.episodes
    for record in both.result.records:
        plain = both.plain[record.key]
        assert record.actions_sha256 == digest(plain.actions)
        assert (record.success, record.steps) == (plain.success, len(plain.actions))
        # The plain loop rendered before all 18 steps, the evaluation before steps 0, 4, 8, 12 and 16.
        assert len(record.observe_ms) == 5
    first, second = (both.plain[key].actions for key in both.settings.episodes)
    assert not np.array_equal(first, second)


def test_a_replay_ends_in_the_same_state_and_makes_a_video(both: Both, tmp_path: Path) -> None:
    imageio = pytest.importorskip("imageio.v2")
    record = both.result.records[0]
    actions = np.load(both.folder / "actions" / f"{record.key.name}.npy")
    scene = LiberoScenes(SUITE, SIZE, "fast")(TASK)
    video = write_video(tmp_path / "videos" / "episode.mp4", replay(scene, record, actions, both.settings, every=4))
    np.testing.assert_array_equal(scene.sim_state(), both.states[record.key])
    frames = imageio.mimread(video)
    assert len(frames) == 1 + 5
    assert frames[0].shape == (SIZE, 2 * SIZE, 3)
    # Upright, and but for compression what the cameras saw.
    scene.reset(record.init_state)
    scene.settle(both.settings.settling_steps)
    seen = np.concatenate([scene.observe()[f"{camera}_image"][::-1] for camera in scene.cameras], axis=1)
    assert np.abs(frames[0].astype(float) - seen).mean() < 12
    wrong = dataclasses.replace(record, success=True)
    with pytest.raises(ReplayError, match="the replay of task03_init002 failed, the episode succeeded"):
        list(replay(scene, wrong, actions[:1], both.settings))
    scene.close()


def test_suites_have_the_tasks_that_released_checkpoints_know() -> None:
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        assert sorted(task_names(suite)) == sorted(RELEASED_TABLES[suite])
        assert sorted(task_names(f"{suite}_swap")) == sorted(RELEASED_TABLES[suite])
    assert len(task_names("90")) == 90
    assert (suite_name("10"), suite_name("libero_goal_lan")) == ("libero_10", "libero_goal_lan")
    assert (max_steps("libero_10"), max_steps("libero_spatial_with_mug")) == (520, 220)
    with pytest.raises(ValueError, match=r"unknown suite 'gaol'.*spatial, object, goal"):
        suite_name("gaol")
    with pytest.raises(ValueError, match=r"libero_goal_env is not complete.*libero-pro list"):
        task_names("libero_goal_env")


def test_the_authors_protocol_is_the_default() -> None:
    settings = libero_settings("spatial")
    assert settings.tasks == tuple(range(10))
    assert settings.init_states == tuple(range(50))
    assert (settings.max_steps, settings.settling_steps, settings.image_size) == (220, 10, 256)
    assert (settings.seed, settings.render, settings.replan_every, settings.displace_cm) == (7, "official", None, 0)


def test_cameras_that_libero_does_not_have() -> None:
    policy = small_policy()
    object.__setattr__(policy.config, "cameras", ("agentview_image", "left_wrist"))
    with pytest.raises(ValueError, match="wants camera 'left_wrist'; LIBERO's observations have agentview_image"):
        evaluate_libero(policy, libero_settings(SUITE, (TASK,)), progress=False)
