"""How much room a hand has at a grasp: its boxes against the boxes of everything that is not to be grasped."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vat_fast.rollout.geometry import Vector

# The Panda gripper around its grip point, metres: the palm begins 24 mm above it and reaches 105 mm to either side
# along the line of the fingers; an open finger stands 46 mm off.
_PALM_HALF = (0.105, 0.036)
_PALM_HEIGHTS = (0.024, 0.200)
_FINGER_OFFSET = 0.046
_FINGER_HALF = (0.009, 0.010)
_FINGER_HEIGHTS = (-0.008, 0.030)

_MARGINS = np.array([0.012, 0.008, 0.005, 0.003, 0.001, -0.001, -0.003, -0.006])
_COST_PER_MARGIN = 1.2
_BLOCKED = 12.0


def clearance_cost(grip: Vector, yaw: float, obstacles: NDArray[np.float64]) -> float:
    """What a grasp costs for its nearness to obstacles: 0 from 12 mm on, 12 where the hand does not fit.

    Args:
        grip: point between the finger pads (3,).
        yaw: of the line through the fingers, radians.
        obstacles: upright boxes (N, 7), see `SceneGeometry.obstacles`.
    """
    room = hand_clearance(grip, yaw, obstacles)
    first = int(np.argmax(room >= _MARGINS))
    return _COST_PER_MARGIN * first if room >= _MARGINS[-1] else _BLOCKED


def hand_clearance(grip: Vector, yaw: float, obstacles: NDArray[np.float64]) -> float:
    """Horizontal room between the open hand and the nearest obstacle, metres; negative where they overlap."""
    along = np.array([np.cos(yaw), np.sin(yaw)])
    parts = [(grip[:2], _PALM_HALF, _PALM_HEIGHTS)]
    parts += [(grip[:2] + side * _FINGER_OFFSET * along, _FINGER_HALF, _FINGER_HEIGHTS) for side in (1, -1)]
    return min(
        _clearance(centre, half, yaw, grip[2] + heights[0], grip[2] + heights[1], obstacles)
        for centre, half, heights in parts
    )


def _clearance(
    centre: Vector, half: tuple[float, float], yaw: float, low: float, high: float, obstacles: NDArray[np.float64]
) -> float:
    """Room between an upright box and the nearest of those at its height, along the axis that separates them best."""
    beside = obstacles[(obstacles[:, 2] + obstacles[:, 5] > low) & (obstacles[:, 2] - obstacles[:, 5] < high)]
    if not len(beside):
        return float("inf")
    offset_N2 = beside[:, :2] - centre
    own_22 = _axes(np.array([yaw]))[0]
    other_N22 = _axes(beside[:, 6])
    axes_N42 = np.concatenate([np.broadcast_to(own_22, other_N22.shape), other_N22], axis=1)
    apart = np.abs(np.einsum("nad,nd->na", axes_N42, offset_N2))
    reach = np.abs(axes_N42 @ own_22.T) @ np.array(half)
    reach += np.einsum("nab,nb->na", np.abs(np.einsum("nad,nbd->nab", axes_N42, other_N22)), beside[:, 3:5])
    return float((apart - reach).max(1).min())


def _axes(angles: Vector) -> NDArray[np.float64]:
    """Unit vectors (N, 2, 2) along and across each angle."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], axis=1)
