"""Scenes moved away from their official initial states, the same for everybody who is evaluated in them.

In LIBERO's initial states an object hardly moves from one to the next (2 cm in libero_object), so that a policy
without eyes can succeed. A displaced scene needs a policy that sees.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from vat_fast.rollout.geometry import Bounds, SceneGeometry, Vector

if TYPE_CHECKING:
    from vat_fast.rollout.scene import Scene

MAX_CM = 15.0
CLEARANCE = 0.025
"""Between a displaced object and its neighbours, metres: room for a finger."""
REACH = 0.75
"""From the robot's base, metres, measured horizontally: what an arm can reach and still turn its hand."""
_TRIES = 300


def plan_displacement(
    scene: Scene, centimetres: float, seeds: tuple[int, ...], *, everything: bool = False
) -> dict[str, tuple[float, float]]:
    """Where the objects of the goal go, each by its own draw, uniform in a square of +-`centimetres` around its place.

    What an object stands on or carries moves with it: a bowl on a cookie box takes the box along. Objects on or in a
    fixture (cabinet, stove, rack) stay, as do fixtures. A displaced object keeps 2.5 cm from its neighbours, or as
    much as it had before, and stays in the robot's reach. Where no draw fits, the square is halved until one does.

    Args:
        scene: reset and settled; it is not changed.
        centimetres: 0 to 15.
        seeds: of the draw, besides suite and task: initial state and displacement seed.
        everything: all objects go, not the goal's alone.

    Returns:
        Object -> its displacement in x and y, metres; objects that stay are not in it.

    Raises:
        ValueError: an impossible distance.
    """
    if not 0 <= centimetres <= MAX_CM:
        raise ValueError(f"objects can be displaced by 0 to {MAX_CM:g} cm, got {centimetres:g}")
    geometry = SceneGeometry(scene.env)
    places = {name: geometry.bounds(name) for name in [*geometry.movable, *geometry.fixtures]}
    rng = np.random.default_rng([zlib.crc32(scene.suite.encode()), scene.task_id, *seeds])
    moved: dict[str, tuple[float, float]] = {}
    for group in _groups(geometry, geometry.movable if everything else _goal_objects(scene)):
        shift = _draw(places, group, geometry.base()[:2], centimetres / 100, rng)
        for name in group:
            places[name] = places[name].moved(shift)
            moved[name] = (float(shift[0]), float(shift[1]))
    return moved


def move_objects(scene: Scene, displacement: Mapping[str, tuple[float, float]]) -> None:
    """Shift objects, as `plan_displacement` says, in the scene's current state."""
    for name, shift in displacement.items():
        joint = scene.env.get_object(name).joints[-1]
        pose = np.array(scene.sim.data.get_joint_qpos(joint))
        pose[:2] += shift
        scene.sim.data.set_joint_qpos(joint, pose)
    scene.sim.forward()


def _goal_objects(scene: Scene) -> list[str]:
    goals = scene.env.parsed_problem["goal_state"]
    return [name.removesuffix("_contain_region") for predicate in goals for name in predicate[1:]]


def _groups(geometry: SceneGeometry, names: list[str]) -> list[list[str]]:
    """For each movable one of some objects: itself and what touches it, directly or through others.

    Groups that touch a fixture are left out.
    """
    pairs, groups, seen = geometry.touching(), [], set[str]()
    for name in names:
        if name not in geometry.movable or name in seen:
            continue
        group, grew = {name}, True
        while grew:
            reached = set().union(*(pair for pair in pairs if pair & group), group)
            grew, group = reached != group, reached
        seen |= group
        if not group & set(geometry.fixtures):
            groups.append(sorted(group))
    return groups


def _draw(
    places: Mapping[str, Bounds], group: list[str], base: Vector, radius: float, rng: np.random.Generator
) -> Vector:
    """A shift (2,) of the group that keeps clear of everything else."""
    own = [places[name] for name in group]
    others = [place for name, place in places.items() if name not in group]
    needed = [[min(CLEARANCE, box.gap(other)) for other in others] for box in own]
    for attempt in range(_TRIES):
        shift: Vector = rng.uniform(-radius, radius, 2) * 0.5 ** (attempt // 50)
        boxes = [box.moved(shift) for box in own]
        clear = all(
            box.gap(other) >= gap
            for box, gaps in zip(boxes, needed, strict=True)
            for other, gap in zip(others, gaps, strict=True)
        )
        if clear and all(_reachable(box, was, base) for box, was in zip(boxes, own, strict=True)):
            return shift
    return np.zeros(2)


def _reachable(box: Bounds, was: Bounds, base: Vector) -> bool:
    """Whether the robot reaches the middle of a box, or at least as well as before."""
    far, before = (float(np.linalg.norm(b.centre[:2] - base)) for b in (box, was))
    return far <= max(REACH, before)
