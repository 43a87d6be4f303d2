"""The policies that an evaluation can drive, and the part of one that belongs to a single episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from vat_fast.chunks import ChunkExecutor
from vat_fast.rollout.episode import Script
from vat_fast.rollout.records import EpisodeKey
from vat_fast.rollout.settings import EvaluationSettings


class ExecutionConfig(Protocol):
    """What an evaluation reads of a policy's configuration; `PolicyConfig` is one."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras that must be rendered when the policy looks; none for a blind policy."""

    @property
    def replan_every(self) -> int | None:
        """See `PolicyConfig`."""

    @property
    def temporal_ensembling(self) -> float | None:
        """See `PolicyConfig`."""


class ChunkPolicy(Protocol):
    """The parts of `Policy` that step many robots at once; a `BlindPolicy` has them too."""

    @property
    def config(self) -> ExecutionConfig:
        """Cameras and execution."""

    @property
    def chunk_size(self) -> int:
        """C, actions per prediction."""

    @property
    def device(self) -> torch.device:
        """Where noise is drawn."""

    def predict(
        self,
        observations: Sequence[Mapping[str, Any]],
        tasks: str | int | Sequence[str | int],
        generator: torch.Generator | None = None,
    ) -> NDArray[np.float32]:
        """Normalised chunks (B, C, A)."""

    def new_executor(self) -> ChunkExecutor:
        """An executor with the policy's settings."""

    def to_robot(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised actions (..., A) to robot units."""

    def task_id(self, task: str | int) -> int:
        """The id of a task."""


@dataclass(frozen=True)
class ScriptedPolicy:
    """A policy that runs inside the simulator process, with the simulator's own state: the scripted expert.

    name: for reports.
    script: see `Script`; picklable.
    """

    name: str
    script: Script


class Driver:
    """One episode's memory of a policy: its chunks and its noise.

    Args:
        policy: shared by all episodes.
        key: which episode.
        settings: its seed, which with the episode decides the noise, whatever other episodes do; and how chunks are
            executed, where that is not left to the policy.
    """

    def __init__(self, policy: ChunkPolicy, key: EpisodeKey, settings: EvaluationSettings) -> None:
        own = policy.new_executor()
        every = own.replan_every if settings.replan_every is None else settings.replan_every
        m = own.ensemble if settings.temporal_ensembling is None else settings.temporal_ensembling
        self._executor = ChunkExecutor(policy.chunk_size, every, None if m == "none" else m)
        self._policy = policy
        self.generator = torch.Generator(policy.device).manual_seed(noise_seed(key, settings.seed))

    def actions(self, chunk: NDArray[np.float32]) -> NDArray[np.float32]:
        """Robot actions (k, A) until the next look, from the chunk (C, A) that this look predicted."""
        self._executor.push(chunk)
        steps = []
        while not self._executor.needs_chunk:
            steps.append(self._policy.to_robot(self._executor.pop()))
        return np.stack(steps)


def noise_seed(key: EpisodeKey, seed: int) -> int:
    """The seed of an episode's noise: decided by the evaluation's seed, the task and the initial state alone."""
    # SeedSequence mixes the three; sums or products of them would give some episodes the same noise.
    mixed = np.random.SeedSequence([seed, key.task, key.init_state]).generate_state(1, np.uint64)[0]
    return int(mixed) >> 1
