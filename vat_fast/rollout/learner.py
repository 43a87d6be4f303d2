"""Demonstrations from where a learner goes wrong: a policy drives first, then the expert shows the way on.

A policy that imitates drifts to states that no demonstration has been in. Demonstrations that begin in those states are
what corrects it (Ross et al., "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
Learning", 2011; here the expert takes over for good instead of labelling each step).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vat_fast.rollout.experts.goal import PlaceGoal
from vat_fast.rollout.geometry import SceneGeometry
from vat_fast.rollout.scene import Scene

_MORE_STEPS = 60
"""How much longer a policy may drive until its hand holds nothing."""


@dataclass(frozen=True)
class Learner:
    """A policy that drives the first steps of a demonstration.

    Args:
        policy: a `Policy`.
        least, most: control steps it drives, drawn for each demonstration.
    """

    policy: Any
    least: int = 10
    most: int = 120

    @classmethod
    def load(cls, checkpoint: str | Path, least: int, most: int) -> Learner:
        """With a saved policy, frozen, in one thread: simulators run beside it."""
        import torch

        from vat_fast.policy import Policy

        torch.set_num_threads(1)
        return cls(Policy.from_pretrained(checkpoint), least, most)

    def drive(self, scene: Scene, rng: np.random.Generator) -> bool:
        """Drive a settled scene; whether there is something left for the expert to show.

        There is not where the policy reached the goal, or still holds the object: what the expert would do first is to
        open the hand.
        """
        geometry, item = SceneGeometry(scene.env), PlaceGoal.of(scene.env).item
        executor = self.policy.new_executor()
        steps = int(rng.integers(self.least, self.most + 1))
        for step in range(steps + _MORE_STEPS):
            if step >= steps and not geometry.is_held(item):
                return True
            if executor.needs_chunk:
                executor.push(self.policy.predict([scene.observe()], scene.task_name)[0])
            if scene.step(self.policy.to_robot(executor.pop())):
                return False
        return False
