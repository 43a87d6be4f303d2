"""Processes side by side that may crash or hang: `Workers` watches and replaces them, `run_jobs` does jobs in them."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from typing import Any, NamedTuple, TypeVar

Job = TypeVar("Job")
AnyWorkers = TypeVar("AnyWorkers", bound="Workers")

Work = Callable[[Any], Any]
"""Answers one message; it lives in a worker process and may keep things from message to message."""


@dataclass(frozen=True)
class Refused:
    """In place of an answer: input that cannot be used (ValueError, OSError, ImportError); another try won't help."""

    message: str


@dataclass(frozen=True)
class Failed:
    """In place of an answer: any other exception, as text."""

    message: str


class Lost(NamedTuple):
    """In place of an answer: the process died or hung and is gone; its slot starts a new one with the next message."""

    reason: str


class Workers:
    """A fixed number of slots, each with a process of its own, which starts when it is first given something.

        with Workers(2, make_work) as workers:
            workers.give(0, message, timeout=60)
            for slot, answer in workers.receive():
                ...

    Args:
        slots: processes at most.
        make_work: picklable; called once in each process that starts.

    Raises:
        ValueError: no slots.
    """

    def __init__(self, slots: int, make_work: Callable[[], Work]) -> None:
        if slots < 1:
            raise ValueError(f"there must be at least 1 process, got {slots}")
        self._context = _context()
        self._make_work = make_work
        self._slots: list[_Process | None] = [None] * slots

    def __len__(self) -> int:
        return len(self._slots)

    def __enter__(self: AnyWorkers) -> AnyWorkers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def give(self, slot: int, message: Any, timeout: float) -> None:
        """Send a message to a slot that waits for nothing; one without a process starts one.

        Args:
            slot: which.
            message: picklable.
            timeout: seconds that the answer may take, with the start of a process; then the process is killed.
        """
        held = self._slots[slot]
        if held is None:
            held = self._slots[slot] = self._start(slot)
        held.allowed, held.deadline = timeout, time.monotonic() + timeout
        # Where the other end is closed, `receive` finds out and says so.
        with suppress(BrokenPipeError, ConnectionResetError):
            held.connection.send(message)

    def receive(self) -> list[tuple[int, Any]]:
        """Wait until at least one slot answers, dies or runs out of time: (slot, answer) of each.

        An answer is what the work returned, or `Refused`, `Failed` or `Lost`.

        Raises:
            RuntimeError: nothing is under way.
        """
        busy = {i: held for i, held in enumerate(self._slots) if held is not None and held.deadline is not None}
        if not busy:
            raise RuntimeError("no process has anything to do")
        first = min(held.deadline for held in busy.values() if held.deadline is not None)
        ready = wait([held.connection for held in busy.values()], timeout=max(0.0, first - time.monotonic()))
        answers: list[tuple[int, Any]] = []
        for slot, held in busy.items():
            if held.connection in ready:
                answers.append((slot, self._read(slot, held)))
            elif held.deadline is not None and time.monotonic() >= held.deadline:
                self.stop(slot)
                answers.append((slot, Lost(f"no reply for {held.allowed:.0f} s")))
        return answers

    def stop(self, slot: int) -> None:
        """End the process of a slot at once, if there is one."""
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

    def _read(self, slot: int, held: _Process) -> Any:
        try:
            answer = held.connection.recv()
        except (EOFError, ConnectionResetError):
            held.process.join(timeout=5)
            code = held.process.exitcode
            self.stop(slot)
            return Lost("the process closed its pipe" if code is None else f"the process ended with status {code}")
        held.deadline = None
        return answer

    def _start(self, slot: int) -> _Process:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._make_work), name=f"worker {slot}", daemon=True
        )
        process.start()
        theirs.close()
        return _Process(process, ours)


class Done(NamedTuple):
    """A job that was done."""

    job: Any
    result: Any


class GivenUp(NamedTuple):
    """A job at which every try ended with a dead or hung process."""

    job: Any
    reason: str


class WorkError(RuntimeError):
    """A job raised an exception that is an error of the program, which another try would not mend."""


def run_jobs(
    jobs: Sequence[Job], make_work: Callable[[], Work], processes: int, *, timeout: float, tries: int = 2
) -> Iterator[Done | GivenUp]:
    """Do the jobs in worker processes; results come as they are ready.

    Args:
        jobs: picklable; they are begun in this order.
        make_work: picklable; called once in each process that starts.
        processes: at most so many at once.
        timeout: seconds for a job, with the start of its process where it needs one; then the process is killed.
        tries: of a job whose process dies or hangs.

    Raises:
        ValueError: no processes, or a job refused its input: it raised a ValueError, OSError or ImportError.
        WorkError: a job raised another exception; the message has its traceback.
    """
    waiting = deque((job, 1) for job in jobs)
    under_way: dict[int, tuple[Job, int]] = {}
    with Workers(min(processes, max(1, len(jobs))), make_work) as workers:
        while waiting or under_way:
            for slot in range(len(workers)):
                if slot not in under_way and waiting:
                    under_way[slot] = waiting.popleft()
                    workers.give(slot, under_way[slot][0], timeout)
            for slot, answer in workers.receive():
                job, attempt = under_way.pop(slot)
                if isinstance(answer, Refused):
                    raise ValueError(answer.message)
                if isinstance(answer, Failed):
                    raise WorkError(answer.message)
                if not isinstance(answer, Lost):
                    yield Done(job, answer)
                elif attempt < tries:
                    waiting.appendleft((job, attempt + 1))
                else:
                    yield GivenUp(job, answer.reason)


class _Process:
    """A running process, its pipe, and until when it must answer (None: it has nothing to do)."""

    def __init__(self, process: multiprocessing.process.BaseProcess, connection: Connection[Any, Any]) -> None:
        self.process, self.connection = process, connection
        self.deadline: float | None = None
        self.allowed = 0.0


def _context() -> ForkServerContext | SpawnContext:
    """How processes start: never forked from this one, whose libraries may have run threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports this package, and with it PyTorch, once for all processes that start.
    context.set_forkserver_preload([__name__])
    return context


def _serve(connection: Connection[Any, Any], make_work: Callable[[], Work]) -> None:
    """Answer messages until the other end closes; the target of a worker process."""
    # Ctrl-C goes to every process of the terminal; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work: Work | None = None
    while True:
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            work = work or make_work()
            answer = work(message)
        except (ValueError, OSError, ImportError) as error:
            answer = Refused(str(error))
        except Exception:
            answer = Failed(traceback.format_exc())
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(answer)
