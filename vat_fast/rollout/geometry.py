"""Where things are in a simulated scene and how much room they take: what experts and displacements know, policies not.

All positions are metres in the world frame. Sizes come from the collision shapes, not from the visible meshes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_ROBOT = ("robot0", "gripper0", "mount0")
_GROUND = ("table", "floor", "wall")
_FINGERS = {
    "gripper0_leftfinger": "left",
    "gripper0_finger_joint1_tip": "left",
    "gripper0_rightfinger": "right",
    "gripper0_finger_joint2_tip": "right",
}


@dataclass(frozen=True)
class Bounds:
    """The axis-aligned box around a thing: `low` and `high` (3,)."""

    low: Vector
    high: Vector

    @property
    def centre(self) -> Vector:
        """(3,)."""
        return (self.low + self.high) / 2

    @property
    def size(self) -> Vector:
        """(3,)."""
        return self.high - self.low

    def gap(self, other: Bounds) -> float:
        """Horizontal distance between two boxes; negative where they overlap seen from above."""
        apart = np.maximum(self.low - other.high, other.low - self.high)[:2]
        return float(np.linalg.norm(np.maximum(apart, 0)) if apart.max() > 0 else apart.max())

    def moved(self, shift: Vector) -> Bounds:
        """The box moved by `shift` (2,) in x and y."""
        offset = np.append(shift, 0.0)
        return Bounds(self.low + offset, self.high + offset)


class SceneGeometry:
    """Positions and sizes of what is in a scene, read from the running simulation.

    Args:
        env: robosuite's environment (`Scene.env`).
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.model, self.data = env.sim.model._model, env.sim.data._data
        solid = (self.model.geom_contype != 0) | (self.model.geom_conaffinity != 0)
        plane = self.model.geom_type == 0
        self._solid = np.flatnonzero(solid & ~plane)
        # The body below the world that each body hangs on: an object, a fixture, the robot.
        root = np.arange(self.model.nbody)
        for body in range(1, self.model.nbody):
            parent = self.model.body_parentid[body]
            root[body] = body if parent == 0 else root[parent]
        self._root_of_geom = root[self.model.geom_bodyid]

    @property
    def movable(self) -> list[str]:
        """Names of the objects that can be moved."""
        return list(self.env.objects_dict)

    @property
    def fixtures(self) -> list[str]:
        """Names of what stands fixed: cabinets, stoves, racks; without tables and floors."""
        return [name for name in self.env.fixtures_dict if not any(word in name for word in _GROUND)]

    def body(self, name: str) -> int:
        """Number of the root body of an object or fixture."""
        return int(self.model.body(self.env.get_object(name).root_body).id)

    def position(self, name: str) -> Vector:
        """(3,) of an object, fixture, or region of a fixture."""
        if name in self.env.object_sites_dict:
            return np.array(self.data.site(name).xpos)
        return np.array(self.data.xpos[self.body(name)])

    def rotation(self, name: str) -> Vector:
        """(3, 3); its columns are the object's axes in the world."""
        return np.array(self.data.xmat[self.body(name)].reshape(3, 3))

    def gripper(self) -> Vector:
        """(3,) between the finger pads, the point that actions move."""
        return np.array(self.data.site("gripper0_grip_site").xpos)

    def finger_yaw(self) -> float:
        """Angle of the line through the fingers about the vertical, radians."""
        line = self.data.body("gripper0_leftfinger").xpos - self.data.body("gripper0_rightfinger").xpos
        return float(np.arctan2(line[1], line[0]))

    def base(self) -> Vector:
        """(3,) of the robot's base."""
        return np.array(self.data.body("robot0_base").xpos)

    def bounds(self, name: str) -> Bounds:
        """The box around an object or fixture."""
        geoms = self.geoms(name)
        centres, halves = self._boxes(geoms)
        return Bounds((centres - halves).min(0), (centres + halves).max(0))

    def width(self, name: str, yaw: float) -> float:
        """Extent of an object along a horizontal line, metres."""
        along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
        low, high = np.inf, -np.inf
        for geom in self.geoms(name):
            box, axes = self.model.geom_aabb[geom], self.data.geom_xmat[geom].reshape(3, 3)
            middle = (self.data.geom_xpos[geom] + axes @ box[:3]) @ along
            half = np.abs(along @ axes) @ box[3:]
            low, high = min(low, middle - half), max(high, middle + half)
        return float(high - low)

    def geoms(self, name: str) -> NDArray[np.int64]:
        """Collision shapes of an object or fixture."""
        return self._solid[self._root_of_geom[self._solid] == self.body(name)]

    def obstacles(self, without: str) -> NDArray[np.float64]:
        """Upright boxes (N, 7) around all collision shapes but the robot's, the ground's and those of one object.

        Each is centre x, y, z, half sizes along its own x and y and along z, and its angle about the vertical.
        """
        skip, boxes = self.body(without), []
        for geom in self._solid:
            name = self.model.body(self.model.geom_bodyid[geom]).name
            root = self._root_of_geom[geom]
            if root in (0, skip) or name.startswith(_ROBOT) or any(word in name for word in _GROUND):
                continue
            boxes.append(self._upright_box(int(geom)))
        found = np.array(boxes).reshape(-1, 7)
        # Shapes of half a metre and more are walls and housings around the scene.
        return found[found[:, 3:6].max(1, initial=0) <= 0.35]

    def is_held(self, name: str) -> bool:
        """Whether both fingers touch an object."""
        item, sides = self.body(name), set()
        for contact in self.data.contact[: self.data.ncon]:
            for this, other in ((contact.geom1, contact.geom2), (contact.geom2, contact.geom1)):
                if self._root_of_geom[this] == item:
                    sides.add(_FINGERS.get(self.model.body(self.model.geom_bodyid[other]).name))
        return {"left", "right"} <= sides

    def touching(self) -> set[frozenset[str]]:
        """Pairs of objects and fixtures that are in contact now."""
        names = {self.body(name): name for name in [*self.movable, *self.fixtures]}
        pairs = set()
        for contact in self.data.contact[: self.data.ncon]:
            roots = [self._root_of_geom[geom] for geom in (contact.geom1, contact.geom2)]
            pair = frozenset(names[root] for root in roots if root in names)
            if len(pair) == 2:
                pairs.add(pair)
        return pairs

    def _boxes(self, geoms: NDArray[np.int64]) -> tuple[Vector, Vector]:
        """Centres and half sizes (N, 3) of the axis-aligned boxes around collision shapes."""
        local, axes = self.model.geom_aabb[geoms], self.data.geom_xmat[geoms].reshape(-1, 3, 3)
        centres = self.data.geom_xpos[geoms] + np.einsum("nij,nj->ni", axes, local[:, :3])
        return centres, np.einsum("nij,nj->ni", np.abs(axes), local[:, 3:])

    def _upright_box(self, geom: int) -> list[float]:
        box, axes = self.model.geom_aabb[geom], self.data.geom_xmat[geom].reshape(3, 3)
        centre = self.data.geom_xpos[geom] + axes @ box[:3]
        half = np.abs(axes) @ box[3:]
        upright = int(np.argmax(np.abs(axes[2])))
        if abs(axes[2, upright]) > 0.98:
            i, j = (axis for axis in range(3) if axis != upright)
            return [*centre, box[3 + i], box[3 + j], half[2], np.arctan2(axes[1, i], axes[0, i])]
        return [*centre, *half, 0.0]  # tilted: the box along the world's axes
