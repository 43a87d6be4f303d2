"""Where to grasp an object: candidates, the cheapest first."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vat_fast.rollout.experts.clearance import clearance_cost
from vat_fast.rollout.geometry import SceneGeometry, Vector

START_YAW = np.pi / 2
"""The hand's angle in the start pose. Turning away from it costs time and, in the end, reach."""

# LIBERO's bowls, metres from the body's origin.
_RIM_HEIGHT = 0.0515
_RIM_RADIUS = 0.048
_BELOW_RIM = 0.017

_ANOTHER_YAW, _ANOTHER_PLACE = 0.3, 0.03
"""Radians and metres from which on a grasp is another one."""
_INWARDS_COST = 600.0
"""Per metre: a rim that is not between the middles of the pads slips."""

_MAX_OPENING = 0.076
"""The fingers open to 80 mm."""


class Grasp(NamedTuple):
    """A way to take hold of an object."""

    cost: float
    grip: Vector
    """Point between the finger pads (3,)."""
    yaw: float
    """Of the line through the fingers, radians in [0, pi)."""

    def resembles(self, other: Grasp) -> bool:
        """Whether it would fail as the other did: neighbours fail alike."""
        turned = abs((self.yaw - other.yaw + np.pi / 2) % np.pi - np.pi / 2)
        return bool(turned < _ANOTHER_YAW and np.linalg.norm(self.grip - other.grip) < _ANOTHER_PLACE)


def plan_grasps(geometry: SceneGeometry, name: str) -> list[Grasp]:
    """Grasps of an object from above, the cheapest first: bowls by the rim, everything else around its middle."""
    grasps = _rim_grasps(geometry, name) if "bowl" in name else _middle_grasps(geometry, name)
    return sorted(grasps, key=lambda grasp: grasp.cost)


def _rim_grasps(geometry: SceneGeometry, name: str) -> list[Grasp]:
    """One finger inside a bowl, one outside, every ten degrees of the rim."""
    obstacles, origin, rotation = geometry.obstacles(without=name), geometry.position(name), geometry.rotation(name)
    up = rotation[:, np.argmax(np.abs(rotation[2]))]  # the bowl's axis, which may be tilted
    up = up * np.sign(up[2])
    gripper, grasps = geometry.gripper(), []
    for angle in np.deg2rad(np.arange(-180, 180, 10)):
        yaw = float(angle % np.pi)
        radial = np.array([np.cos(angle), np.sin(angle), 0.0])
        radial -= up * (radial @ up)
        radial /= np.linalg.norm(radial)
        rim = origin + up * _RIM_HEIGHT + radial * _RIM_RADIUS
        for inwards in (0.0, 0.010, 0.020):  # the outer finger nearer to the rim, where a neighbour stands close
            grip = rim - radial * inwards - np.array([0, 0, _BELOW_RIM])
            cost = abs(yaw - START_YAW) + 0.1 * float(np.hypot(*(grip - gripper)[:2])) + _INWARDS_COST * inwards
            grasps.append(Grasp(cost + clearance_cost(grip, yaw, obstacles), grip, yaw))
    return grasps


def _middle_grasps(geometry: SceneGeometry, name: str) -> list[Grasp]:
    """Around boxes, cans and bottles, along the length of flat boxes where their middle is blocked."""
    obstacles, bounds = geometry.obstacles(without=name), geometry.bounds(name)
    # The palm's lower side is 24 mm above the grip point, the finger tips 10 mm below it.
    low, high = bounds.low[2], bounds.high[2]
    height = max(min(bounds.centre[2], high - 0.018), high - 0.022, low + 0.012)
    length = max(0.0, bounds.size[0] / 2 - 0.015)
    flat = bounds.size[0] > 0.06 and bounds.size[2] < 0.05
    grasps = []
    for yaw in np.deg2rad([90, 75, 105, 60, 120, 0, 15, 165]):
        if geometry.width(name, yaw) > _MAX_OPENING:
            continue
        for offset in np.linspace(-length, length, 7) if flat else (0.0,):
            grip = np.array([bounds.centre[0] + offset, bounds.centre[1], height])
            cost = abs(yaw - START_YAW) + 15 * abs(offset)
            grasps.append(Grasp(cost + clearance_cost(grip, yaw, obstacles), grip, float(yaw)))
    return grasps
