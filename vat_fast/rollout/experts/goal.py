"""What a task asks for, as far as the experts can do it: put one object in or on another thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vat_fast.rollout.geometry import Bounds, SceneGeometry, Vector

_UP_THE_RACK = 0.03
"""From the front edge of the bottle rack's shelf up its slope, metres."""


class NoExpertError(ValueError):
    """A task that no scripted expert can do."""


@dataclass(frozen=True)
class PlaceGoal:
    """Put one object somewhere.

    Args:
        item: the object to move.
        target: object, or region of a fixture.
        inside: drop it into the target, and not on top.
        on_fixture: the target is a region of a fixture.
    """

    item: str
    target: str
    inside: bool
    on_fixture: bool

    @classmethod
    def of(cls, env: Any) -> PlaceGoal:
        """The goal of a scene.

        Raises:
            NoExpertError: the task is something else: opening, turning, pushing, several things.
        """
        goals = env.parsed_problem["goal_state"]
        words = " and ".join(" ".join(goal) for goal in goals)
        if len(goals) != 1 or goals[0][0] not in ("on", "in") or goals[0][1] not in env.objects_dict:
            raise NoExpertError(f"the scripted expert puts one object in or on something, this task's goal is {words}")
        predicate, item, target = goals[0]
        holder = target.removesuffix("_contain_region")
        if holder in env.objects_dict:
            return cls(item, holder, predicate == "in", on_fixture=False)
        site = env.object_sites_dict.get(target)
        if (
            predicate == "in"
            or site is None
            or site.parent_name not in env.fixtures_dict
            or "table" in site.parent_name
        ):
            raise NoExpertError(f"the scripted expert cannot put something in drawers or push it, the goal is {words}")
        return cls(item, target, inside=False, on_fixture=True)

    def target_bounds(self, geometry: SceneGeometry) -> Bounds:
        """The box around the target, a point for a region."""
        if not self.on_fixture:
            return geometry.bounds(self.target)
        point = geometry.position(self.target)
        if "rack" in self.target:
            # The region is a slope, and its front edge is where a bottle would slip off.
            normal = geometry.env.sim.data.get_site_xmat(self.target)[2]
            point = point + _UP_THE_RACK * np.asarray(normal)
        return Bounds(point, point)

    def release_height(self, geometry: SceneGeometry, held: Vector, above_bottom: float) -> float:
        """Height of the hand at which to let go.

        Args:
            held: from the object to the hand (3,).
            above_bottom: of the hand above the object's lowest point, metres.
        """
        if self.inside:
            return float(geometry.bounds(self.target).high[2] - 0.03 + above_bottom)
        if self.on_fixture:
            return float(self.target_bounds(geometry).low[2] - 0.005 + above_bottom)
        # A bowl held by its rim hangs aslant: what touches down first is lower than its middle.
        drop = geometry.position(self.item)[2] - geometry.bounds(self.item).low[2]
        return float(geometry.position(self.target)[2] + held[2] + max(drop, 0.0) + 0.008)
