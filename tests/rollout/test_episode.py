"""Real LIBERO scenes: evaluating in parallel with rendering on demand is the plain loop, bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rollout.toys import make_policy
from vat_fast.cli import main
from vat_fast.policy import Policy
from vat_fast.rollout.install_check import SimulatorError, check_simulator
from vat_fast.rollout.libero import LiberoScenes, evaluate_libero, libero_settings
from vat_fast.rollout.messages import Finished
from vat_fast.rollout.plain import plain_episode
from vat_fast.rollout.records import EpisodeKey, EpisodeRecord, digest, load_actions, read_records
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.rollout.suites import max_steps, suite_name, task_names
from vat_fast.rollout.video import ReplayError, replay
from vat_fast.tasks import RELEASED_TABLES

try:
    check_simulator()
except SimulatorError as error:
    pytest.skip(f"no LIBERO here: {error}", allow_module_level=True)

SUITE, TASK, STATES = "libero_object", 3, (2, 0)
SIZE = 64


@dataclass
class Both:
    """The same episodes by the plain loop and by `vat-fast eval`."""

    settings: EvaluationSettings
    plain: dict[EpisodeKey, Finished]
    states: dict[EpisodeKey, Any]
    records: list[EpisodeRecord]
    folder: Path
    printed: str


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    root = tmp_path_factory.mktemp("evaluation")
    make_policy(task_names(SUITE), size=48).save_pretrained(root / "policy")
    settings = libero_settings(
        SUITE, (TASK,), init_states=STATES, step_limit=18, settling_steps=2, image_size=SIZE, render="fast"
    )
    policy = Policy.from_pretrained(root / "policy")
    plain, states = {}, {}
    # One scene for both episodes, and in the other order than below: what was played before must not matter.
    scene = LiberoScenes(SUITE, SIZE, "fast")(TASK)
    for key in reversed(settings.episodes):
        plain[key] = plain_episode(policy, scene, scene.task_name, key, settings)
        states[key] = scene.sim_state()
    scene.close()
    command = f"eval {root / 'policy'} --suite object --tasks {TASK} --init-states 2,0 --max-steps 18 --size {SIZE}"
    command += f" --settling-steps 2 --render fast --video {TASK}:2 --out {root / 'out'}"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(command.split()) == 0
    return Both(settings, plain, states, read_records(root / "out"), root / "out", printed.getvalue())


def test_same_actions_and_outcomes_as_the_plain_loop(both: Both) -> None:
    assert sorted(record.key for record in both.records) == sorted(both.settings.episodes)
    for record in both.records:
        plain = both.plain[record.key]
        assert record.actions_sha256 == digest(plain.actions)
        assert (record.success, record.steps) == (plain.success, len(plain.actions))
        # The plain loop rendered before all 18 steps, the evaluation before steps 0, 4, 8, 12 and 16.
        assert len(record.observe_ms) == 5
    first, second = (both.plain[key].actions for key in both.settings.episodes)
    assert not np.array_equal(first, second)


def test_the_command_reports_and_shows(both: Both) -> None:
    imageio = pytest.importorskip("imageio.v2")
    assert re.search(rf"{TASK} +{task_names(SUITE)[TASK]} +0/2 +0\.0 % +0\.0 % to +65\.8 %", both.printed)
    name = f"task{TASK:02d}_init002_failure.mp4"
    assert f'<video src="videos/{name}"' in (both.folder / "report.html").read_text()
    frames = imageio.mimread(both.folder / "videos" / name)
    assert len(frames) == 1 + 9
    assert frames[0].shape == (SIZE, 2 * SIZE, 3)


def test_a_replay_ends_in_the_same_state(both: Both) -> None:
    record = next(record for record in both.records if record.init_state == 2)
    actions = load_actions(both.folder, record)
    scene = LiberoScenes(SUITE, SIZE, "fast")(TASK)
    frames = list(replay(scene, record, actions, both.settings, every=8))
    np.testing.assert_array_equal(scene.sim_state(), both.states[record.key])
    # Upright: what the cameras see now, flipped.
    seen = scene.observe()
    last = np.concatenate([seen[f"{camera}_image"][::-1] for camera in scene.cameras], axis=1)
    np.testing.assert_array_equal(frames[-1], last)
    assert len(frames) == 4
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
    policy = make_policy(task_names(SUITE), size=48)
    object.__setattr__(policy.config, "cameras", ("agentview_image", "left_wrist"))
    with pytest.raises(ValueError, match="wants camera 'left_wrist'; LIBERO's observations have agentview_image"):
        evaluate_libero(policy, libero_settings(SUITE, (TASK,)), progress=False)
