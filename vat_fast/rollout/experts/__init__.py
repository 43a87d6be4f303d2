"""Scripted experts: solve pick-and-place tasks of LIBERO with privileged state, to collect and to compare with."""

from __future__ import annotations

from collections.abc import Iterator

from numpy.typing import ArrayLike

from vat_fast.rollout.experts.goal import NoExpertError
from vat_fast.rollout.experts.motion import Command, Phase
from vat_fast.rollout.experts.pick_place import Expert
from vat_fast.rollout.scene import Scene

__all__ = ["Command", "Expert", "NoExpertError", "Phase", "expert_actions"]


def expert_actions(scene: Scene, seed: int = 0) -> Iterator[ArrayLike]:
    """The expert's actions (7,) for a scene that has settled, without end: a scripted policy. It draws nothing.

    Raises:
        NoExpertError: at once, for a task that no expert can do.
    """
    expert = Expert(scene)
    return (command.action for command in expert.commands())
