"""Moving the hand in straight lines by the robot's delta actions, one command per control step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vat_fast.rollout.geometry import SceneGeometry, Vector

OPEN, CLOSE = -1.0, 1.0

Phase = Literal["approach", "descend", "close", "lift", "carry", "lower", "open", "retreat"]

_METRES_PER_ACTION = 0.05
_GAIN = 1.6
"""Of the distance to the goal; the controller takes a few steps to follow, so it can ask for more than the rest."""
_PROGRESS, _PATIENCE, _MOST_GAIN = 0.0005, 6, 8.0
"""Metres, steps without so much of them, and how far the gain may grow then."""
_TURN_GAIN = 4.0
_MAX_TURN = 0.6
_YAW_TOLERANCE = 0.08


class Command(NamedTuple):
    """What an expert does in one control step."""

    action: NDArray[np.float64]
    """(7,)."""
    phase: Phase


class Hand:
    """Steers the hand by what the simulation says about it.

    Args:
        geometry: of the scene.
        max_action: largest component of the motion, at most 1: the speed.
    """

    def __init__(self, geometry: SceneGeometry, max_action: float = 1.0) -> None:
        self.geometry, self.max_action = geometry, max_action

    def go(
        self,
        goal: Vector,
        grip: float,
        phase: Phase,
        *,
        tolerance: tuple[float, float],
        max_steps: int,
        yaw: float | None = None,
    ) -> Iterator[Command]:
        """Commands until the hand is at `goal` (3,).

        Args:
            grip: OPEN or CLOSE.
            tolerance: metres, horizontally and vertically.
            max_steps: give up after so many; whoever follows sees where the hand is.
            yaw: angle of the fingers' line to turn to, radians; None for no turning.
        """
        gain, nearest, stalled = _GAIN, np.inf, 0
        for _ in range(max_steps):
            error = goal - self.geometry.gripper()
            there = np.linalg.norm(error[:2]) < tolerance[0] and abs(error[2]) < tolerance[1]
            if there and (yaw is None or abs(self._yaw_error(yaw)) < _YAW_TOLERANCE):
                return
            # Near the limit of a joint the controller stops short of the goal: ask for more until it moves.
            if there or np.linalg.norm(error) < nearest - _PROGRESS:
                nearest, stalled = min(nearest, float(np.linalg.norm(error))), 0
            else:
                stalled += 1
            if stalled > _PATIENCE:
                gain = min(1.25 * gain, _MOST_GAIN)
            yield Command(self._towards(goal, grip, yaw, gain), phase)

    def hold(self, steps: int, grip: float, phase: Phase, at: Vector | None = None) -> Iterator[Command]:
        """Commands that open or close the hand: still, or kept at a point."""
        for _ in range(steps):
            still = np.array([0, 0, 0, 0, 0, 0, grip])
            yield Command(still if at is None else self._towards(at, grip, None), phase)

    def _towards(self, goal: Vector, grip: float, yaw: float | None, gain: float = _GAIN) -> NDArray[np.float64]:
        motion = gain * (goal - self.geometry.gripper()) / _METRES_PER_ACTION
        motion *= min(1.0, self.max_action / max(np.abs(motion).max(), 1e-9))  # shortened as a whole: a straight line
        turn = 0.0 if yaw is None else float(np.clip(_TURN_GAIN * self._yaw_error(yaw), -_MAX_TURN, _MAX_TURN))
        return np.array([*motion, 0, 0, turn if abs(turn) > 0.02 else 0, grip])

    def _yaw_error(self, yaw: float) -> float:
        """In [-pi/2, pi/2): the fingers look alike, so half a turn is none."""
        return (yaw - self.geometry.finger_yaw() + np.pi / 2) % np.pi - np.pi / 2
