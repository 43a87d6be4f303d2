"""The scripted expert: picks an object and places it, by what the simulation knows and no policy sees."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vat_fast.rollout.experts.goal import PlaceGoal
from vat_fast.rollout.experts.grasp import START_YAW, Grasp, plan_grasps
from vat_fast.rollout.experts.motion import CLOSE, OPEN, Command, Hand
from vat_fast.rollout.geometry import SceneGeometry, Vector
from vat_fast.rollout.scene import Scene

_LIFTED = 0.03
_CORRIDOR = 0.09
"""Beside the straight way of a carried object: what stands there is passed from above."""


class Expert:
    """Does the task of a scene that has been reset and settled.

        for command in Expert(scene).commands():
            if scene.step(command.action):
                break

    The commands react to where things are when each is asked for, so that they correct what noise, a push or a
    slipped object has changed. After a failed grasp the expert tries again, another way.

    Args:
        scene: one with a task the experts can do.
        max_action: largest component of a motion, at most 1: the speed.

    Raises:
        NoExpertError: the task is none of them.
    """

    def __init__(self, scene: Scene, max_action: float = 1.0) -> None:
        self.goal = PlaceGoal.of(scene.env)
        self.geometry = SceneGeometry(scene.env)
        self.hand = Hand(self.geometry, max_action)

    def commands(self) -> Iterator[Command]:
        """One command per control step, without end; the caller stops at success or when time is up."""
        tried: list[Grasp] = []
        while True:
            grasps = plan_grasps(self.geometry, self.goal.item)
            if not grasps:  # knocked over, it may be too wide for the fingers
                yield from self.hand.hold(10, OPEN, "retreat")
                continue
            grasp = next((one for one in grasps if not any(one.resembles(other) for other in tried)), grasps[0])
            tried.append(grasp)
            start = self.geometry.position(self.goal.item)
            above_bottom = grasp.grip[2] - self.geometry.bounds(self.goal.item).low[2]
            yield from self._pick(grasp, above_bottom)
            if self._height() - start[2] > _LIFTED:
                yield from self._place(above_bottom)
            yield from self._let_go()

    def _height(self) -> float:
        return float(self.geometry.position(self.goal.item)[2])

    def _pick(self, grasp: Grasp, above_bottom: float) -> Iterator[Command]:
        yaw = None if abs(grasp.yaw - START_YAW) < 0.05 else grasp.yaw
        top = self.geometry.bounds(self.goal.item).high[2]
        height = grasp.grip[2] + max(0.08, top - grasp.grip[2] + 0.06)
        height = max(height, min(self.geometry.gripper()[2], height + 0.1))
        over = np.array([*grasp.grip[:2], height])
        hand = self.hand
        yield from hand.go(over, OPEN, "approach", tolerance=(0.012, 0.05), max_steps=80, yaw=yaw)
        near = grasp.grip + np.array([0, 0, 0.03])
        yield from hand.go(near, OPEN, "descend", tolerance=(0.006, 0.012), max_steps=40, yaw=yaw)
        yield from hand.go(grasp.grip, OPEN, "descend", tolerance=(0.006, 0.006), max_steps=20, yaw=yaw)
        yield from hand.hold(10, CLOSE, "close", at=grasp.grip)
        here = self.geometry.gripper()
        over = np.array([*here[:2], self._safe_height(here, above_bottom)])
        yield from hand.go(over, CLOSE, "lift", tolerance=(0.03, 0.02), max_steps=50)

    def _place(self, above_bottom: float) -> Iterator[Command]:
        height = self.geometry.gripper()[2]
        yield from self.hand.go(self._over_target(height), CLOSE, "carry", tolerance=(0.012, 0.04), max_steps=80)
        held = self.geometry.gripper() - self.geometry.position(self.goal.item)
        down = self._over_target(self.goal.release_height(self.geometry, held, above_bottom))
        yield from self.hand.go(down, CLOSE, "lower", tolerance=(0.012, 0.008), max_steps=40)

    def _let_go(self) -> Iterator[Command]:
        yield from self.hand.hold(8, OPEN, "open")
        away = self.geometry.gripper() + np.array([0, 0, 0.12])
        yield from self.hand.go(away, OPEN, "retreat", tolerance=(0.03, 0.03), max_steps=40)
        yield from self.hand.hold(10, OPEN, "retreat")

    def _over_target(self, height: float) -> Vector:
        """Where the hand must be for the held object to be over the target."""
        held = self.geometry.gripper() - self.geometry.position(self.goal.item)
        centre = self.goal.target_bounds(self.geometry).centre
        return np.array([centre[0] + held[0], centre[1] + held[1], height])

    def _safe_height(self, start: Vector, above_bottom: float) -> float:
        """Of the hand, so that the held object passes over the target's rim and everything on the way to it."""
        target = self.goal.target_bounds(self.geometry)
        tops = [float(target.high[2])]
        way = target.centre[:2] - start[:2]
        for x, y, z, half_x, half_y, half_z, _ in self.geometry.obstacles(without=self.goal.item):
            offset = np.array([x, y]) - start[:2]
            along = float(np.clip(offset @ way / max(float(way @ way), 1e-9), 0, 1))
            if np.linalg.norm(offset - along * way) < _CORRIDOR + min(half_x, half_y) and along > 0.15:
                tops.append(z + half_z)
        return max(max(tops) + 0.04 + above_bottom, start[2] + 0.10)
