"""Actions that differ from the expert's on purpose, so that demonstrations show how to get back on the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vat_fast.rollout.experts.motion import Command, Phase

# How much of the noise a phase bears: none while the fingers move, half where neighbours are near.
_SHARE: dict[Phase, float] = {
    "approach": 1.0,
    "lift": 1.0,
    "carry": 1.0,
    "retreat": 1.0,
    "descend": 0.5,
    "lower": 0.5,
    "close": 0.0,
    "open": 0.0,
}
_PUSHED: tuple[Phase, ...] = ("approach", "descend", "carry")
_CORRELATION = 0.7
"""Of the noise from one step to the next."""
_TURN_SHARE = 0.15
"""Of the noise in rotations, against that in positions."""
_PUSH_RATE = 0.03
_PUSH_STEPS = (4, 9)
_PUSH_STRENGTH = (0.5, 1.0)


@dataclass(frozen=True)
class Disturbance:
    """How executed actions differ from the expert's.

    Args:
        noise: standard deviation of correlated noise on position deltas, in action units; 0 for none.
        pushes: now and then push the hand aside for a few steps, from where the expert has to recover.

    Raises:
        ValueError: noise outside 0 to 1.
    """

    noise: float = 0.0
    pushes: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.noise <= 1:
            raise ValueError(f"noise must be 0 to 1 (actions are -1 to 1), got {self.noise}")


class Disturber:
    """Disturbs the commands of one episode.

    Args:
        disturbance: how.
        rng: its only source of randomness.
    """

    def __init__(self, disturbance: Disturbance, rng: np.random.Generator) -> None:
        self.disturbance, self._rng = disturbance, rng
        self._noise = np.zeros(6)
        self._push = np.zeros(3)
        self._push_left = 0

    def executed(self, command: Command) -> NDArray[np.float64]:
        """The action (7,) to carry out instead of the command's, within [-1, 1]; the gripper is never disturbed."""
        action = command.action.copy()
        if self.disturbance.noise:
            fresh = self._rng.normal(0, 1, 6)
            self._noise = _CORRELATION * self._noise + np.sqrt(1 - _CORRELATION**2) * fresh
            scale = self.disturbance.noise * _SHARE[command.phase]
            action[:3] += scale * self._noise[:3]
            action[3:6] += _TURN_SHARE * scale * self._noise[3:]
        if self.disturbance.pushes:
            self._start_push(command.phase)
            if self._push_left:
                self._push_left -= 1
                if command.phase in _PUSHED:
                    action[:3] = self._push
        action[:6] = np.clip(action[:6], -1, 1)
        return action

    def _start_push(self, phase: Phase) -> None:
        if self._push_left or phase not in _PUSHED or self._rng.random() >= _PUSH_RATE:
            return
        direction = self._rng.normal(0, 1, 3)
        direction[2] = abs(direction[2])  # never into the table
        self._push = direction / np.abs(direction).max() * self._rng.uniform(*_PUSH_STRENGTH)
        self._push_left = int(self._rng.integers(*_PUSH_STEPS))
