"""The loop as a paper's appendix has it: one process, one scene, both cameras at every step. Never make it fast.

It is the yardstick: `evaluate` must give the same actions and outcomes bit for bit, and is measured against it.
"""

from __future__ import annotations

import numpy as np

from vat_fast.policy import Policy
from vat_fast.rollout.drivers import noise_seed
from vat_fast.rollout.episode import SceneLike
from vat_fast.rollout.messages import Finished
from vat_fast.rollout.records import EpisodeKey
from vat_fast.rollout.settings import EvaluationSettings


def plain_episode(
    policy: Policy, scene: SceneLike, task_name: str, key: EpisodeKey, settings: EvaluationSettings
) -> Finished:
    """Run one episode of `settings` in a scene of its task; execution is as the policy's own configuration says."""
    policy.reset(noise_seed(key, settings.seed))
    scene.reset(key.init_state, displace_cm=settings.displace_cm, displace_seed=settings.seed)
    scene.settle(settings.settling_steps)
    actions = []
    for _ in range(settings.max_steps):
        observation = scene.observe()
        action = policy.step(observation, task_name)
        actions.append(action)
        if scene.step(action):
            return Finished(True, np.stack(actions), 0.0)
    return Finished(False, np.stack(actions), 0.0)
