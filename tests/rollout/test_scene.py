"""A scene is LIBERO's own simulation, repeats itself bit for bit, and looking changes nothing."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from vat_fast.observation import read_proprio
from vat_fast.rollout import install_check
from vat_fast.rollout.install_check import SimulatorError, check_simulator, simulator_report
from vat_fast.rollout.render import RenderSettings
from vat_fast.rollout.scene import CAMERAS, NO_OP, Scene

ACTIONS = np.random.default_rng(0).uniform(-1, 1, (6, 7))


def run(scene: Scene, init_state: int, looks: bool) -> NDArray[np.float64]:
    scene.reset(init_state)
    scene.settle(2)
    for action in ACTIONS:
        if looks:
            scene.observe()
        scene.step(action)
    return scene.sim_state()


def test_repeats_itself_whether_anybody_looks(cheese_scene: Scene) -> None:
    first = run(cheese_scene, 3, looks=False)
    other = run(cheese_scene, 4, looks=True)
    assert np.array_equal(run(cheese_scene, 3, looks=True), first)
    assert not np.array_equal(other, first)


def test_simulates_as_libero_does(cheese_scene: Scene) -> None:
    """Against LIBERO's own environment, with two images in every step: the same states, images and robot state."""
    from libero.libero.envs import OffScreenRenderEnv

    gc.collect()  # robosuite frees in whatever OpenGL context is current: nothing of others may be left to free
    official = Scene("libero_object", 1, size=48)
    # It renders there too: nobody else may look until it has.
    plain = OffScreenRenderEnv(bddl_file_name=str(cheese_scene.files.bddl), camera_heights=48, camera_widths=48)
    np.random.seed(2)
    plain.reset()
    plain.set_init_state(cheese_scene.files.init_states[2])
    cheese_scene.reset(2)
    official.reset(2)
    for action in (NO_OP, *ACTIONS[:2]):
        expected, _, done, _ = plain.step(action)
        assert cheese_scene.step(action) == done
        official.step(action)
    assert np.array_equal(cheese_scene.sim_state(), plain.get_sim_state())
    assert np.array_equal(official.sim_state(), plain.get_sim_state())
    # LIBERO's own observations are taken a substep or so before the step's end; what it renders now is the same.
    plain.sim._render_context_offscreen.gl_ctx.make_current()
    now = [plain.sim.render(width=48, height=48, camera_name=camera) for camera in CAMERAS]
    plain.close()
    before = cheese_scene.observe()
    seen = official.observe()
    official.close()
    after = cheese_scene.observe()
    for camera, image in zip(CAMERAS, now, strict=True):
        assert np.array_equal(seen[f"{camera}_image"], image)
        assert np.array_equal(before[f"{camera}_image"], after[f"{camera}_image"])  # closing another took nothing
        assert 0 < np.abs(after[f"{camera}_image"].astype(int) - image).mean() < 10
    np.testing.assert_allclose(before["state"], read_proprio(expected, 8), atol=2e-3)
    np.testing.assert_allclose(cheese_scene.robot_state()["joint_pos"], expected["robot0_joint_pos"], atol=5e-3)


def test_nobody_elses_end_takes_what_a_scene_renders_with(cheese_scene: Scene) -> None:
    """A scene that nobody closed, and a robosuite environment: both free what they had, by number, when collected."""
    from libero.libero.envs import OffScreenRenderEnv

    cheese_scene.reset(5)
    before = cheese_scene.observe()
    other = Scene("libero_object", 1, size=32)
    other.observe()
    plain = OffScreenRenderEnv(bddl_file_name=str(cheese_scene.files.bddl), camera_heights=32, camera_widths=32)
    cheese_scene.observe()
    del other
    plain.close()
    del plain
    gc.collect()
    after = cheese_scene.observe()
    for camera in CAMERAS:
        assert np.array_equal(before[f"{camera}_image"], after[f"{camera}_image"])


def test_triton_can_be_loaded_after_rendering(simulator: None) -> None:
    """Mesa's LLVM and Triton's in one process: a model may come after a scene."""
    pytest.importorskip("triton")
    code = """
from vat_fast.rollout.scene import Scene
with Scene("goal", 8, size=32) as scene:
    scene.reset(0)
    scene.observe()
    import triton.language
    import triton.runtime
    scene.observe()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


def test_leaves_numpys_generator_alone(cheese_scene: Scene) -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    cheese_scene.reset(1)
    assert np.random.rand() == expected


def test_names_and_counts(cheese_scene: Scene) -> None:
    assert (cheese_scene.suite, cheese_scene.task_id, cheese_scene.num_init_states) == ("libero_object", 1, 50)
    assert cheese_scene.task_name == "pick up the cream cheese and place it in the basket"


def test_refuses_what_cannot_be(cheese_scene: Scene) -> None:
    with pytest.raises(ValueError, match="init states 0 to 49, got 50"):
        cheese_scene.reset(50)
    with pytest.raises(ValueError, match="7 finite numbers"):
        cheese_scene.step([0, 0, 0])
    with pytest.raises(ValueError, match="7 finite numbers"):
        cheese_scene.step([np.nan] * 7)
    with pytest.raises(ValueError, match="has tasks 0 to 9, got 10"):
        Scene("object", 10)
    with pytest.raises(ValueError, match="unknown suite 'objects'"):
        Scene("objects", 0)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        Scene("object", 0, size=8)
    with pytest.raises(ValueError, match="official or fast"):
        RenderSettings.named("quick")


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.10.0")
    with pytest.raises(SimulatorError, match=r"mujoco 3\.10\.0 .* pip install mujoco==3\.3\.7"):
        check_simulator()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: install_check.MUJOCO_VERSION)
    monkeypatch.setattr(install_check.sys, "platform", "linux")
    monkeypatch.setattr(install_check.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "osmesa")
    with pytest.raises(SimulatorError, match="apt-get install libosmesa6"):
        check_simulator()
    check_simulator(rendering=False)
    monkeypatch.setitem(os.environ, "MUJOCO_GL", "magic")
    with pytest.raises(SimulatorError, match="osmesa, egl, glfw, got 'magic'"):
        check_simulator()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SimulatorError, match=r"pip install 'vat_fast\[libero\]'"):
        check_simulator()
    assert "not here" in simulator_report()
