"""Simulator processes side by side: started when needed, watched, replaced when they die or hang."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, NamedTuple

from vat_fast.rollout.messages import Act, Begin
from vat_fast.rollout.simulator import simulate


class Lost(NamedTuple):
    """In place of a reply: the process died or hung and is gone; its slot starts a new one when it is told to begin."""

    reason: str


class SimulatorPool:
    """A fixed number of slots, each with a simulator process of its own.

        with SimulatorPool(2, (factory, settings, script), timeout=120) as pool:
            pool.send(0, Begin(key))
            for slot, reply in pool.receive():
                ...

    Args:
        slots: processes at most.
        arguments: of `simulate`, after the connection; they must be picklable.
        timeout: seconds that a reply may take; then the process is killed.
        start_timeout: the same where a process has to start or to make a scene first.

    Raises:
        ValueError: no slots, or a timeout that is not above 0.
    """

    def __init__(
        self, slots: int, arguments: Sequence[Any], *, timeout: float = 120.0, start_timeout: float = 300.0
    ) -> None:
        if slots < 1:
            raise ValueError(f"there must be at least 1 process, got {slots}")
        if not (timeout > 0 and start_timeout > 0):
            raise ValueError(f"timeouts must be above 0 seconds, got {timeout} and {start_timeout}")
        self._context = _context()
        self._arguments = tuple(arguments)
        self._timeout, self._start_timeout = timeout, start_timeout
        self._slots: list[_Slot | None] = [None] * slots

    def __len__(self) -> int:
        return len(self._slots)

    def __enter__(self) -> SimulatorPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def task(self, slot: int) -> int | None:
        """The task whose scene a slot holds."""
        held = self._slots[slot]
        return None if held is None else held.task

    def send(self, slot: int, command: Begin | Act) -> None:
        """Give a slot that waits for nothing its next command; one without a process starts one."""
        held = self._slots[slot]
        if held is None:
            held = self._slots[slot] = self._start(slot)
        held.allowed = self._timeout
        if isinstance(command, Begin):
            # A scripted episode runs to its end before it replies.
            if held.task != command.key.task or command.scripted:
                held.allowed = self._start_timeout
            held.task = command.key.task
        held.deadline = time.monotonic() + held.allowed
        # Where the other end is closed, `receive` finds out and says so.
        with suppress(BrokenPipeError, ConnectionResetError):
            held.connection.send(command)

    def receive(self) -> list[tuple[int, Any]]:
        """Wait until at least one slot replies, dies or runs out of time: (slot, reply or `Lost`) of each.

        Raises:
            RuntimeError: nothing is under way.
        """
        busy = {i: slot for i, slot in enumerate(self._slots) if slot is not None and slot.deadline is not None}
        if not busy:
            raise RuntimeError("no simulator has anything to do")
        first = min(slot.deadline for slot in busy.values() if slot.deadline is not None)
        ready = wait([slot.connection for slot in busy.values()], timeout=max(0.0, first - time.monotonic()))
        replies: list[tuple[int, Any]] = []
        for index, slot in busy.items():
            if slot.connection in ready:
                replies.append((index, self._read(index, slot)))
            elif slot.deadline is not None and time.monotonic() >= slot.deadline:
                self.stop(index)
                replies.append((index, Lost(f"no reply for {slot.allowed:.0f} s")))
        return replies

    def stop(self, slot: int) -> None:
        """End the process of a slot at once."""
        held = self._slots[slot]
        if held is not None:
            self._slots[slot] = None
            held.connection.close()
            held.process.kill()
            held.process.join()
            held.process.close()

    def close(self) -> None:
        """End all processes."""
        for slot in range(len(self._slots)):
            self.stop(slot)

    def _read(self, index: int, slot: _Slot) -> Any:
        try:
            reply = slot.connection.recv()
        except (EOFError, ConnectionResetError):
            slot.process.join(timeout=5)
            code = slot.process.exitcode
            self.stop(index)
            return Lost("the process closed its pipe" if code is None else f"the process ended with status {code}")
        slot.deadline = None
        return reply

    def _start(self, slot: int) -> _Slot:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=simulate, args=(theirs, *self._arguments), name=f"simulator {slot}", daemon=True
        )
        process.start()
        theirs.close()
        return _Slot(process, ours)


def _context() -> ForkServerContext | SpawnContext:
    """How processes start: never forked from this one, whose libraries have run threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports PyTorch once; every simulator is forked from it.
    context.set_forkserver_preload([simulate.__module__])
    return context


class _Slot:
    """A running process, its pipe, the task of its scene, and until when it must reply (None: it has nothing to do)."""

    def __init__(self, process: multiprocessing.process.BaseProcess, connection: Connection[Any, Any]) -> None:
        self.process, self.connection = process, connection
        self.task: int | None = None
        self.deadline: float | None = None
        self.allowed = 0.0
