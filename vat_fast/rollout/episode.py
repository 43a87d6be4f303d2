"""One episode in a simulator: settle, then look and act in turns until success or the step limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vat_fast.rollout.messages import Finished, Look
from vat_fast.rollout.records import EpisodeKey
from vat_fast.rollout.settings import EvaluationSettings


class SceneLike(Protocol):
    """What an episode needs of a simulated scene; `vat_fast.rollout.scene.Scene` is one."""

    def reset(self, init_state: int, displace_cm: float = 0.0, displace_seed: int = 0) -> None:
        """Go to an official initial state, with the objects displaced where asked for."""

    def settle(self, steps: int) -> None:
        """Take control steps without motion."""

    def step(self, action: NDArray[np.float32]) -> bool:
        """Take one control step; whether the task is done."""

    def observe(self) -> Mapping[str, Any]:
        """Camera images and proprioception now. Rendering happens here and nowhere else."""

    def close(self) -> None:
        """Free what the simulator holds."""


SceneFactory = Callable[[int], SceneLike]
"""Makes the scene of a task; it travels to the simulator processes, so it must be picklable."""
Script = Callable[[SceneLike, int], Iterator[ArrayLike]]
"""A scripted policy: yields actions (A,) for a scene that has settled; the second argument is its seed."""


class Episode:
    """An episode that is under way in a scene.

    Args:
        scene: of the episode's task; it is reset here.
        key: which episode.
        settings: of the evaluation.
    """

    def __init__(self, scene: SceneLike, key: EpisodeKey, settings: EvaluationSettings) -> None:
        scene.reset(key.init_state, displace_cm=settings.displace_cm, displace_seed=settings.seed)
        scene.settle(settings.settling_steps)
        self.scene = scene
        self.success = False
        self._max_steps = settings.max_steps
        self._actions: list[NDArray[np.float32]] = []
        self._step_seconds = 0.0

    @property
    def over(self) -> bool:
        """Whether the task is done or the step limit reached."""
        return self.success or len(self._actions) >= self._max_steps

    def look(self) -> Look:
        """What the robot sees now."""
        start = time.perf_counter()
        observation = dict(self.scene.observe())
        return Look(observation, 1e3 * (time.perf_counter() - start))

    def act(self, actions: Iterable[ArrayLike]) -> None:
        """Execute actions (A,) in turn, as long as the episode is not over."""
        for action in actions:
            # Rounded to what is recorded, so that a replay takes the same steps.
            executed = np.asarray(action, dtype=np.float32)
            start = time.perf_counter()
            self.success = bool(self.scene.step(executed))
            self._step_seconds += time.perf_counter() - start
            self._actions.append(executed)
            if self.over:
                return

    def result(self) -> Finished:
        """Outcome and executed actions."""
        count = len(self._actions)
        actions = np.stack(self._actions) if count else np.empty((0, 7), np.float32)
        return Finished(self.success, actions, 1e3 * self._step_seconds / max(count, 1))
