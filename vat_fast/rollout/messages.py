"""What an evaluation and a simulator process say to each other; instead of a reply comes what workers.py has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vat_fast.rollout.records import EpisodeKey


@dataclass(frozen=True)
class Begin:
    """To the simulator: start this episode. `scripted` ones run to their end there; others answer with a `Look`."""

    key: EpisodeKey
    scripted: bool = False


@dataclass(frozen=True)
class Act:
    """To the simulator: execute these actions (k, A), then look again."""

    actions: NDArray[np.float32]


@dataclass(frozen=True)
class Look:
    """From the simulator: what the robot sees; `observe_ms` is what the look cost."""

    observation: dict[str, Any]
    observe_ms: float


@dataclass(frozen=True)
class Finished:
    """From the simulator: the episode's end. actions: all that were executed, (steps, A); step_ms: mean of a step."""

    success: bool
    actions: NDArray[np.float32]
    step_ms: float
