"""What is evaluated and how: the authors' protocol, unless told otherwise."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vat_fast.rollout.records import EpisodeKey

SETTLING_ACTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""No motion, gripper open: what the robot does while the objects come to rest."""
OFFICIAL_INIT_STATES = 50


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything beside the policy that decides the outcome of an evaluation.

    The defaults are the authors' protocol: all 50 official initial states, 10 settling steps, 256-pixel images in the
    official rendering, whole chunks executed open loop, the step limit of the suite. Together with the policy they
    decide every episode bit for bit, however many processes simulate, except where `batched` is set.

    suite: the simulator's name of the suite.
    tasks: indices in the suite.
    init_states: indices of official initial states.
    max_steps: control steps after which an episode has failed.
    seed: of a diffusion policy's noise, of a scripted policy, and of displacements.
    settling_steps: control steps before the policy takes over.
    image_size: side of the camera images, in pixels.
    render: "official", or "fast", for policies that were trained on images rendered so.
    replan_every: execute only so many actions of each chunk; None: what the policy's configuration says.
    temporal_ensembling: m of `ChunkExecutor`'s weights exp(-m * i) instead of the policy's; "none" for no
        ensembling, None: what the policy's configuration says.
    displace_cm: move the objects up to so many centimetres from where the initial state has them.
    batched: predict for all robots that wait in one forward pass. Faster on a GPU, but the last bits of a
        prediction then depend on which robots happened to wait together.

    Raises:
        ValueError: a value that cannot be.
    """

    suite: str
    tasks: tuple[int, ...]
    max_steps: int
    init_states: tuple[int, ...] = tuple(range(OFFICIAL_INIT_STATES))
    seed: int = 7
    settling_steps: int = 10
    image_size: int = 256
    render: str = "official"
    replan_every: int | None = None
    temporal_ensembling: float | Literal["none"] | None = None
    displace_cm: float = 0.0
    batched: bool = False

    def __post_init__(self) -> None:
        for name in ("tasks", "init_states"):
            values = _indices(name, getattr(self, name))
            object.__setattr__(self, name, values)
        for name, least in (("max_steps", 1), ("seed", 0), ("settling_steps", 0), ("image_size", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.replan_every is not None and self.replan_every < 1:
            raise ValueError(f"replan_every must be at least 1, or None, got {self.replan_every!r}")
        m = self.temporal_ensembling
        if m is not None and m != "none" and (isinstance(m, str) or not (math.isfinite(m) and m >= 0)):
            raise ValueError(f"temporal_ensembling must be a number of at least 0, 'none', or None, got {m!r}")
        if self.render not in ("official", "fast"):
            raise ValueError(f"render must be official or fast, got {self.render!r}")
        if not 0 <= self.displace_cm < 100:
            raise ValueError(f"displace_cm must be centimetres from 0 to below 100, got {self.displace_cm!r}")

    @property
    def episodes(self) -> list[EpisodeKey]:
        """Every episode, task by task."""
        return [EpisodeKey(task, state) for task in self.tasks for state in self.init_states]

    def to_dict(self) -> dict[str, Any]:
        """What decides the outcome of a single episode, for `settings.json`.

        Tasks and initial states are left out: an evaluation may be continued with more of them.
        """
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ("tasks", "init_states")}


def _indices(name: str, values: Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(values)
    if not numbers or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
        raise ValueError(f"{name} must be at least one index from 0 on, got {list(numbers)!r}")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"{name} must have no index twice, got {list(numbers)!r}")
    return numbers
