"""Jobs done side by side in processes that may crash or hang."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, NamedTuple, TypeVar, cast

Job = TypeVar("Job")

Work = Callable[[Any], Any]
"""Does one job; it lives in a worker process and may keep things from job to job."""


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
    if processes < 1:
        raise ValueError(f"there must be at least 1 process, got {processes}")
    waiting = deque((job, 1) for job in jobs)
    workers: list[_Worker[Job]] = [_Worker(make_work) for _ in range(min(processes, len(jobs)))]
    try:
        while True:
            for worker in workers:
                if worker.job is None and waiting:
                    worker.begin(*waiting.popleft(), timeout)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            left = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            ready = wait([worker.connection for worker in busy], timeout=left)
            for worker in busy:
                if worker.connection not in ready and time.monotonic() < worker.deadline:
                    continue
                job, attempt = cast(Job, worker.job), worker.attempt
                result, lost = worker.reply(worker.connection in ready, timeout)
                if lost is None:
                    yield Done(job, result)
                elif attempt < tries:
                    waiting.appendleft((job, attempt + 1))
                else:
                    yield GivenUp(job, lost)
    finally:
        for worker in workers:
            worker.kill()


class _Worker(Generic[Job]):
    """One process at a time and the job it is at."""

    def __init__(self, make_work: Callable[[], Work]) -> None:
        methods = multiprocessing.get_all_start_methods()
        # Never forked from this process, whose libraries may have run threads.
        self._context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
        if "forkserver" in methods:
            # The server imports this package, and with it PyTorch, once for all processes that start.
            self._context.set_forkserver_preload([__name__])
        self._make_work = make_work
        self._process: Any = None
        self.connection: Connection[Any, Any]
        self.job: Job | None = None
        self.attempt, self.deadline = 0, 0.0

    def begin(self, job: Job, attempt: int, timeout: float) -> None:
        """Send a job, to a new process where there is none."""
        if self._process is None:
            self.connection, theirs = self._context.Pipe()
            self._process = self._context.Process(  # type: ignore[attr-defined]
                target=_serve, args=(theirs, self._make_work), daemon=True
            )
            self._process.start()
            theirs.close()
        self.job, self.attempt, self.deadline = job, attempt, time.monotonic() + timeout
        with suppress(BrokenPipeError, ConnectionResetError):  # `reply` finds out
            self.connection.send(job)

    def reply(self, ready: bool, timeout: float) -> tuple[Any, str | None]:
        """The job's result, or why the process was lost; the worker is free afterwards."""
        self.job = None
        if not ready:
            self.kill()
            return None, f"no reply for {timeout:.0f} s"
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(timeout=5)
            code = self._process.exitcode
            self.kill()
            return None, f"the process ended with status {code}"
        if error is not None:
            kind, text = error
            raise ValueError(text) if kind == "input" else WorkError(text)
        return result, None

    def kill(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self.connection.close()
            self._process = None


def _serve(connection: Connection[Any, Any], make_work: Callable[[], Work]) -> None:
    """Do jobs until the other end closes; the target of a worker process."""
    # Ctrl-C goes to every process of the terminal; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    work: Work | None = None
    while True:
        try:
            job = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            work = work or make_work()
            reply: tuple[Any, tuple[str, str] | None] = (work(job), None)
        except (ValueError, OSError, ImportError) as error:
            reply = (None, ("input", str(error)))
        except Exception:
            reply = (None, ("program", traceback.format_exc()))
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send(reply)
