"""LIBERO's suites: their names, their tasks in the official order, and how long an episode may take."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

SHORT_NAMES = ("spatial", "object", "goal", "10", "90")
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520, "libero_90": 400}
"""Control steps after which an episode of a suite has failed: the authors' limits, twice the longest demonstration."""


def suite_name(name: str) -> str:
    """The simulator's name of a suite: "spatial" and "libero_spatial" are one; perturbed suites have their full name.

    Raises:
        ValueError: no such suite; the message has the closest names.
        ImportError: the simulator is not installed.
    """
    suites = _task_map()
    full = f"libero_{name}" if name in SHORT_NAMES else name
    if full not in suites:
        close = get_close_matches(full, list(suites), n=3, cutoff=0.5)
        hint = f"; the closest are {', '.join(close)}" if close else ""
        raise ValueError(
            f"unknown suite {name!r}{hint}; take {', '.join(SHORT_NAMES)} or one that `libero-pro list` shows complete"
        )
    return full


def task_names(suite: str) -> list[str]:
    """The tasks of a suite in the official order, as policies know them: "put the bowl on the stove".

    A perturbed suite keeps the names of the suite it comes from: they are the tasks that a policy was trained on, also
    where the instruction that the scene shows is worded differently.

    Raises:
        ValueError: no such suite, or files of a task are not in the installed package.
        ImportError: the simulator is not installed.
    """
    suite = suite_name(suite)
    tasks = _task_map()[suite]
    if not tasks:
        raise ValueError(f"suite {suite} has no tasks in the installed package; `libero-pro list` shows complete ones")
    folder = _bddl_folder() / suite
    missing = [task for task in tasks if not (folder / f"{task}.bddl").is_file()]
    if missing:
        raise ValueError(
            f"suite {suite} is not complete in the installed package: {len(missing)} of {len(tasks)} tasks have no "
            f"scene file, {missing[0]} for example; `libero-pro list` shows complete suites"
        )
    return [_language(task) for task in tasks]


def check_choice(suite: str, tasks: Sequence[int], init_states: Sequence[int]) -> None:
    """Refuse tasks that a suite does not have, and choices of nothing.

    Raises:
        ValueError: see above.
    """
    count = len(task_names(suite))
    for task in tasks:
        if not 0 <= task < count:
            raise ValueError(f"suite {suite} has tasks 0 to {count - 1}, got {task}")
    if not tasks or not init_states:
        raise ValueError("there must be at least one task and one initial state")


def base_suite(suite: str) -> str:
    """The official suite that a perturbed one comes from: "libero_goal_lan" -> "libero_goal".

    Raises:
        ValueError: a suite that comes from none.
    """
    for base in MAX_STEPS:
        if suite == base or suite.startswith(f"{base}_"):
            return base
    raise ValueError(f"suite {suite!r} comes from none of {', '.join(MAX_STEPS)}")


def max_steps(suite: str) -> int:
    """The authors' limit on the control steps of an episode; a perturbed suite has that of the suite it comes from.

    Raises:
        ValueError: a suite that the protocol says nothing about.
    """
    try:
        return MAX_STEPS[base_suite(suite)]
    except ValueError as error:
        raise ValueError(f"{error}, so the protocol has no step limit for it: give one (--max-steps)") from error


def _language(task: str) -> str:
    """KITCHEN_SCENE3_turn_on_the_stove -> "turn on the stove"."""
    words = task.split("_")
    scene = next((i for i, word in enumerate(words) if word.startswith("SCENE")), -1) if task[0].isupper() else -1
    return " ".join(words[scene + 1 :])


def _task_map() -> dict[str, list[str]]:
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    return libero_task_map


def _bddl_folder() -> Path:
    from libero.libero import get_libero_path

    return Path(get_libero_path("bddl_files"))
