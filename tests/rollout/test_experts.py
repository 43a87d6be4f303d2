"""The scripted expert solves tasks, also when disturbed, and says which it cannot do."""

from __future__ import annotations

import numpy as np
import pytest

from vat_fast.rollout.experts import Command, Expert, NoExpertError, expert_actions
from vat_fast.rollout.experts.clearance import hand_clearance
from vat_fast.rollout.experts.disturb import Disturbance, Disturber
from vat_fast.rollout.experts.goal import PlaceGoal
from vat_fast.rollout.experts.grasp import Grasp, plan_grasps
from vat_fast.rollout.geometry import SceneGeometry
from vat_fast.rollout.scene import SETTLING_STEPS, Scene


def test_solves_an_episode(cheese_scene: Scene) -> None:
    cheese_scene.reset(7)
    cheese_scene.settle(SETTLING_STEPS)
    for steps, action in enumerate(expert_actions(cheese_scene), 1):
        assert np.abs(action).max() <= 1
        if cheese_scene.step(action) or steps == 280:
            break
    assert cheese_scene.success
    assert steps < 140


@pytest.mark.parametrize(
    ("task", "init_state"),
    [
        pytest.param(4, 22, id="rim in a drawer that only some grasps reach"),
        pytest.param(7, 39, id="bowl that hangs aslant and is let go too low"),
        pytest.param(8, 29, id="arm at the limit of a joint"),
    ],
)
def test_solves_what_is_hard(simulator: None, task: int, init_state: int) -> None:
    with Scene("spatial", task, cameras=()) as scene:
        scene.reset(init_state)
        scene.settle(SETTLING_STEPS)
        for steps, action in enumerate(expert_actions(scene), 1):
            if scene.step(action) or steps == 220:
                break
        assert scene.success


def test_another_grasp_is_elsewhere_or_turned() -> None:
    grasp = Grasp(0.0, np.array([0.1, 0.2, 0.9]), 0.05)
    assert grasp.resembles(Grasp(1.0, np.array([0.11, 0.2, 0.9]), np.pi - 0.05))  # the fingers look alike
    assert not grasp.resembles(grasp._replace(yaw=0.6))
    assert not grasp.resembles(grasp._replace(grip=np.array([0.14, 0.2, 0.9])))


def test_solves_a_displaced_and_disturbed_episode(cheese_scene: Scene) -> None:
    cheese_scene.reset(11, displace_cm=6, displace_seed=3)
    cheese_scene.settle(SETTLING_STEPS)
    disturber = Disturber(Disturbance(0.25, pushes=True), np.random.default_rng(0))
    differs = 0
    for steps, command in enumerate(Expert(cheese_scene).commands(), 1):
        executed = disturber.executed(command)
        differs += not np.array_equal(executed, command.action)
        if cheese_scene.step(executed) or steps == 280:
            break
    assert cheese_scene.success
    assert differs > 40


def test_grasps_avoid_neighbours(cheese_scene: Scene) -> None:
    cheese_scene.reset(0)
    cheese_scene.settle(SETTLING_STEPS)
    geometry = SceneGeometry(cheese_scene.env)
    grasps = plan_grasps(geometry, "cream_cheese_1")
    assert [g.cost for g in grasps] == sorted(g.cost for g in grasps)
    room = hand_clearance(grasps[0].grip, grasps[0].yaw, geometry.obstacles(without="cream_cheese_1"))
    assert room > 0
    # A hand that is moved so far that a finger stands in the cheese, which now is an obstacle.
    aside = grasps[0].grip + 0.046 * np.array([np.cos(grasps[0].yaw), np.sin(grasps[0].yaw), 0])
    assert hand_clearance(aside, grasps[0].yaw, geometry.obstacles(without="milk_1")) < 0


def test_room_beside_a_hand() -> None:
    # A cube of 10 cm at palm height; the palm reaches 36 mm across the fingers' line and 105 mm along it.
    cube = np.array([[0.0, 0.2, 0.1, 0.05, 0.05, 0.05, 0.0]])
    grip = np.zeros(3)
    assert hand_clearance(grip, 0.0, cube) == pytest.approx(0.2 - 0.05 - 0.036)
    assert hand_clearance(grip, np.pi / 2, cube) == pytest.approx(0.2 - 0.05 - 0.105)
    turned = cube.copy()
    turned[0, 6] = np.pi / 4
    assert hand_clearance(grip, np.pi / 2, turned) == pytest.approx(0.2 - 0.05 * np.sqrt(2) - 0.105)
    low = cube.copy()
    low[0, 2] = -0.2
    assert hand_clearance(grip, 0.0, low) == np.inf


class Env:
    """As much of robosuite's environment as a goal is read from."""

    def __init__(self, goals: list[list[str]]) -> None:
        self.parsed_problem = {"goal_state": goals}
        self.objects_dict = {"bowl_1": None, "plate_1": None}
        self.fixtures_dict = {"cabinet_1": None}
        self.object_sites_dict = {"cabinet_1_top_side": Site("cabinet_1"), "cabinet_1_top_region": Site("cabinet_1")}


class Site:
    def __init__(self, parent_name: str) -> None:
        self.parent_name = parent_name


def test_goals() -> None:
    assert PlaceGoal.of(Env([["on", "bowl_1", "plate_1"]])) == PlaceGoal("bowl_1", "plate_1", False, False)
    top = PlaceGoal.of(Env([["on", "bowl_1", "cabinet_1_top_side"]]))
    assert top == PlaceGoal("bowl_1", "cabinet_1_top_side", False, on_fixture=True)
    for goals in (
        [["open", "cabinet_1_top_region"]],
        [["in", "bowl_1", "cabinet_1_top_region"]],
        [["on", "bowl_1", "plate_1"], ["on", "plate_1", "cabinet_1_top_side"]],
    ):
        with pytest.raises(NoExpertError, match=f"scripted expert .* {goals[0][1]}"):
            PlaceGoal.of(Env(goals))


def test_disturbance() -> None:
    command = Command(np.array([0.5, -1, 1, 0, 0, 0.1, 1]), "approach")
    assert np.array_equal(Disturber(Disturbance(), np.random.default_rng(0)).executed(command), command.action)
    noisy = Disturber(Disturbance(0.3, pushes=True), np.random.default_rng(0))
    executed = np.stack([noisy.executed(command) for _ in range(300)])
    assert np.abs(executed[:, :6]).max() <= 1
    assert (executed[:, 6] == 1).all()
    # Some steps are pushed: they have one motion for several steps, and never a downward one.
    pushed = (np.diff(executed[:, :3], axis=0) == 0).all(1)
    assert 20 < pushed.sum() < 150
    assert (executed[1:][pushed][:, 2] >= 0).all()
    closing = [noisy.executed(Command(command.action, "close")) for _ in range(50)]
    assert all(np.array_equal(action, command.action) for action in closing)
    with pytest.raises(ValueError, match="noise must be 0 to 1"):
        Disturbance(1.5)
