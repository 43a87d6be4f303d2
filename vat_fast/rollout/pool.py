"""Simulator processes side by side, each with the scene of one task."""

from __future__ import annotations

import functools

from vat_fast.rollout.episode import SceneFactory, Script
from vat_fast.rollout.messages import Act, Begin
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.rollout.simulator import Simulator
from vat_fast.rollout.workers import Workers


class SimulatorPool(Workers):
    """Workers that are simulators.

        with SimulatorPool(2, factory, settings) as pool:
            pool.send(0, Begin(key))
            for slot, reply in pool.receive():  # Look, Finished, Refused, Failed or Lost
                ...

    Args:
        slots: processes at most.
        factory, settings, script: of `Simulator`; they must be picklable.
        timeout: seconds that a reply may take; then the process is killed.
        start_timeout: the same where a process has to start or to make a scene first.

    Raises:
        ValueError: no slots, or a timeout that is not above 0.
    """

    def __init__(
        self,
        slots: int,
        factory: SceneFactory,
        settings: EvaluationSettings,
        script: Script | None = None,
        *,
        timeout: float = 120.0,
        start_timeout: float = 300.0,
    ) -> None:
        if not (timeout > 0 and start_timeout > 0):
            raise ValueError(f"timeouts must be above 0 seconds, got {timeout} and {start_timeout}")
        super().__init__(slots, functools.partial(Simulator, factory, settings, script))
        self._timeout, self._start_timeout = timeout, start_timeout
        self._tasks: list[int | None] = [None] * slots

    def task(self, slot: int) -> int | None:
        """The task whose scene a slot holds."""
        return self._tasks[slot]

    def send(self, slot: int, command: Begin | Act) -> None:
        """Give a slot that waits for nothing its next command; one without a process starts one."""
        allowed = self._timeout
        if isinstance(command, Begin):
            # A scripted episode runs to its end before it replies.
            if self._tasks[slot] != command.key.task or command.scripted:
                allowed = self._start_timeout
            self._tasks[slot] = command.key.task
        self.give(slot, command, allowed)

    def stop(self, slot: int) -> None:
        """End the process of a slot at once, if there is one; its scene is gone."""
        super().stop(slot)
        self._tasks[slot] = None
