"""One demonstration in a scene: the expert acts, disturbed or not, and what a policy would have seen is recorded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vat_fast.rollout.experts import Expert
from vat_fast.rollout.experts.disturb import Disturbance, Disturber
from vat_fast.rollout.learner import Learner
from vat_fast.rollout.locate import ObjectLocator
from vat_fast.rollout.scene import SETTLING_STEPS, Scene
from vat_fast.rollout.suites import max_steps

TAIL_STEPS = 10
"""Steps recorded after the goal was first reached: an object may still be in the hand then."""


@dataclass(frozen=True)
class Demonstration:
    """T steps: each the observation before the action, and the action.

    Args:
        images: camera -> (T, S, S, 3) uint8, upside down as rendered.
        actions: (T, 7), what the expert wanted in each state: what a policy should learn.
        executed: (T, 7), what was carried out.
        states: (T, N) flattened simulator states.
        robot: eef_pos (T, 3), eef_ori (T, 3, axis-angle), eef_quat (T, 4), gripper_qpos (T, 2), joint_pos (T, 7).
        objects: names of the O objects and fixtures.
        positions: (T, O, 3) float32, where each one's middle is, metres; see `ObjectLocator.positions`.
        places: (T, V, O, 3) float32, where it is in the images; see `ObjectLocator.places`.
        gripper: (T, 3) float32, the point between the finger pads, metres.
        model_xml: the simulated model.
        displacement: object -> metres in x and y.
    """

    images: dict[str, NDArray[np.uint8]]
    actions: NDArray[np.float64]
    executed: NDArray[np.float64]
    states: NDArray[np.float64]
    robot: dict[str, NDArray[np.float64]]
    objects: tuple[str, ...]
    positions: NDArray[np.float32]
    places: NDArray[np.float32]
    gripper: NDArray[np.float32]
    model_xml: str
    displacement: dict[str, tuple[float, float]]

    def __len__(self) -> int:
        return len(self.actions)


def demonstrate(
    scene: Scene,
    init_state: int,
    disturbance: Disturbance,
    rng: np.random.Generator,
    *,
    displace_cm: float = 0.0,
    displace_seed: int = 0,
    learner: Learner | None = None,
) -> Demonstration | None:
    """Let the expert do the scene's task once; None where it does not succeed within the suite's step limit.

    Args:
        init_state, displace_cm, displace_seed: as in `Scene.reset`.
        rng: of the disturbance, and of how long the learner drives.
        learner: drives first; what the expert does from there on is the demonstration. None is also the answer where
            the learner needs no help.

    Raises:
        NoExpertError: no expert can do this task.
    """
    scene.reset(init_state, displace_cm, displace_seed)
    scene.settle(SETTLING_STEPS)
    if learner is not None and not learner.drive(scene, rng):
        return None
    disturber, limit = Disturber(disturbance, rng), max_steps(scene.suite)
    locator = ObjectLocator(scene)
    steps: list[dict[str, NDArray[np.generic]]] = []
    length, reached = 0, None
    for command in Expert(scene).commands():
        executed = disturber.executed(command)
        before = {**scene.observe(), **scene.robot_state(), "sim_state": scene.sim_state()}
        known = {"positions": locator.positions(), "places": locator.places(), "gripper": locator.gripper()}
        steps.append({**before, **known, "action": command.action, "executed": executed})
        if scene.step(executed):
            length = len(steps)  # ends where the goal was last seen reached
            reached = length if reached is None else reached
        if len(steps) >= (limit if reached is None else reached + TAIL_STEPS):
            break
    if reached is None:
        return None

    def column(name: str) -> NDArray[np.generic]:
        return np.stack([step[name] for step in steps[:length]])

    robot = {name: column(name) for name in ("eef_pos", "eef_quat", "gripper_qpos", "joint_pos")}
    return Demonstration(
        images={camera: column(f"{camera}_image") for camera in scene.cameras},  # type: ignore[misc]
        actions=column("action"),  # type: ignore[arg-type]
        executed=column("executed"),  # type: ignore[arg-type]
        states=column("sim_state"),  # type: ignore[arg-type]
        robot={**robot, "eef_ori": column("state")[:, 3:6]},  # type: ignore[dict-item]
        objects=locator.names,
        positions=column("positions"),  # type: ignore[arg-type]
        places=column("places"),  # type: ignore[arg-type]
        gripper=column("gripper"),  # type: ignore[arg-type]
        model_xml=scene.sim.model.get_xml(),
        displacement=scene.displacement,
    )
