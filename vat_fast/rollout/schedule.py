"""Which episode a simulator plays next: one of the task whose scene it holds, as far as there are any."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from vat_fast.rollout.records import EpisodeKey


class Schedule:
    """Episodes that wait.

    Making a scene takes seconds, so simulators stay with their task. One that has to change takes the task with the
    most waiting episodes for each simulator that is at it already.
    """

    def __init__(self, episodes: Iterable[EpisodeKey]) -> None:
        self._waiting: dict[int, deque[EpisodeKey]] = {}
        for key in episodes:
            self._waiting.setdefault(key.task, deque()).append(key)

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._waiting.values())

    def take(self, task: int | None, busy: Sequence[int]) -> EpisodeKey | None:
        """The next episode for a simulator that holds the scene of `task`; None where nothing waits.

        Args:
            task: None for a simulator without a scene.
            busy: the tasks that other simulators are at.
        """
        if not self._waiting:
            return None
        if task is None or task not in self._waiting:
            task = max(self._waiting, key=lambda t: len(self._waiting[t]) / (1 + busy.count(t)))
        key = self._waiting[task].popleft()
        if not self._waiting[task]:
            del self._waiting[task]
        return key

    def put_back(self, key: EpisodeKey) -> None:
        """Let an episode that was taken wait again, before the others of its task."""
        self._waiting.setdefault(key.task, deque()).appendleft(key)
