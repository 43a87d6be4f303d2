"""Where objects are, in the world and in the images: labels to train a vision stream with, which no policy sees."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vat_fast.rollout.geometry import SceneGeometry
from vat_fast.rollout.scene import Scene


def kind_of(name: str) -> str:
    """What an instance is: "akita_black_bowl_2" -> "akita_black_bowl"."""
    return re.sub(r"_\d+$", "", name)


class ObjectLocator:
    """Follows the objects and fixtures of a scene. Make it after a reset; it changes nothing.

    Args:
        scene: reset.
        cameras: whose images are meant; None: the scene's.
    """

    def __init__(self, scene: Scene, cameras: Sequence[str] | None = None) -> None:
        self._geometry = geometry = SceneGeometry(scene.env)
        self._model, self._data = geometry.model, geometry.data
        self.names = (*geometry.movable, *geometry.fixtures)
        self.kinds = tuple(kind_of(name) for name in self.names)
        self._bodies = np.array([geometry.body(name) for name in self.names])
        # The middle of each one's box, in its own axes: origins are somewhere at the bottom.
        self._middles = np.array(
            [geometry.rotation(n).T @ (geometry.bounds(n).centre - geometry.position(n)) for n in self.names]
        )
        cameras = scene.cameras if cameras is None else cameras
        self._cameras = [int(self._model.camera(name).id) for name in cameras]

    def positions(self) -> NDArray[np.float32]:
        """(O, 3): the middle of each object and fixture, metres in the world frame."""
        axes = self._data.xmat[self._bodies].reshape(-1, 3, 3)
        middles = self._data.xpos[self._bodies] + np.einsum("oij,oj->oi", axes, self._middles)
        return middles.astype(np.float32)

    def gripper(self) -> NDArray[np.float32]:
        """(3,): the point between the finger pads, metres."""
        return self._geometry.gripper().astype(np.float32)

    def places(self) -> NDArray[np.float32]:
        """(V, O, 3): column and row in each camera's image, as fractions of its side, and depth in metres.

        Rows count as in the array that is rendered, from the lower edge of what the camera sees. What is behind the
        camera has a negative depth, what is outside the image lies outside 0 to 1; nothing is hidden behind anything.
        """
        places = []
        for camera in self._cameras:
            axes = self._data.cam_xmat[camera].reshape(3, 3)
            x, y, z = ((self.positions() - self._data.cam_xpos[camera]) @ axes).T  # the camera looks along -z
            depth = -z
            half = np.tan(np.deg2rad(self._model.cam_fovy[camera]) / 2) * np.where(np.abs(depth) < 1e-6, 1e-6, depth)
            places.append(np.stack([0.5 + 0.5 * x / half, 0.5 + 0.5 * y / half, depth], axis=1))
        return np.stack(places).astype(np.float32) if places else np.empty((0, len(self.names), 3), np.float32)
