"""Evaluation in LIBERO: the suite's tasks, limits and scenes filled in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vat_fast.rollout.drivers import ChunkPolicy, ScriptedPolicy
from vat_fast.rollout.evaluate import EvaluationResult, evaluate
from vat_fast.rollout.install_check import check_simulator
from vat_fast.rollout.render import RenderSettings
from vat_fast.rollout.scene import CAMERAS, Scene
from vat_fast.rollout.settings import EvaluationSettings
from vat_fast.rollout.suites import max_steps, suite_name, task_names


@dataclass(frozen=True)
class LiberoScenes:
    """Makes the scene of a task; see `Scene` for the fields.

    render_threads: of a software renderer, where LP_NUM_THREADS does not say; the images do not depend on it. None:
        one per core.
    """

    suite: str
    size: int = 256
    render: str = "official"
    cameras: tuple[str, ...] = CAMERAS
    render_threads: int | None = None

    def __call__(self, task: int) -> Scene:
        """The scene of a task of the suite."""
        if self.render_threads is not None:
            # Mesa reads it when it makes a process's first context.
            os.environ.setdefault("LP_NUM_THREADS", str(self.render_threads))
        return Scene(self.suite, task, size=self.size, render=RenderSettings.named(self.render), cameras=self.cameras)


def libero_settings(
    suite: str, tasks: Sequence[int] | None = None, *, step_limit: int | None = None, **options: Any
) -> EvaluationSettings:
    """The authors' protocol for a suite, with `options` of `EvaluationSettings` that differ.

    Args:
        suite: "spatial" or "libero_spatial", or the full name of a perturbed suite.
        tasks: indices; None: all.
        step_limit: instead of the suite's limit.

    Raises:
        ValueError: no such suite, or a value that cannot be.
        ImportError: the simulator is not installed.
    """
    check_simulator(rendering=False)
    name = suite_name(suite)
    every = range(len(task_names(name)))
    limit = max_steps(name) if step_limit is None else step_limit
    return EvaluationSettings(name, tuple(every if tasks is None else tasks), limit, **options)


def evaluate_libero(
    policy: ChunkPolicy | ScriptedPolicy,
    settings: EvaluationSettings,
    *,
    folder: str | Path | None = None,
    processes: int = 2,
    **options: Any,
) -> EvaluationResult:
    """`evaluate` in LIBERO's scenes; `options` are its others (timeout, progress, ...).

        result = evaluate_libero(policy, libero_settings("goal", tasks=[3], init_states=range(5)))
        result.success_rate

    Raises:
        ValueError, EvaluationError: as `evaluate`; or a camera that is not LIBERO's.
        ImportError: the simulator is missing, or the library that renders for it.
    """
    cameras = () if isinstance(policy, ScriptedPolicy) else simulator_cameras(policy.config.cameras)
    check_simulator(rendering=bool(cameras))
    threads = max(1, (os.cpu_count() or 1) // max(1, processes))
    scenes = LiberoScenes(settings.suite, settings.image_size, settings.render, cameras, threads)
    names = task_names(settings.suite)
    return evaluate(policy, settings, names=names, scenes=scenes, folder=folder, processes=processes, **options)


def simulator_cameras(names: Sequence[str]) -> tuple[str, ...]:
    """A policy's camera names as the simulator has them: "agentview_image" -> "agentview".

    Raises:
        ValueError: a name that LIBERO's observations do not have.
    """
    known = {f"{camera}_image": camera for camera in CAMERAS}
    for name in names:
        if name not in known:
            raise ValueError(f"the policy wants camera {name!r}; LIBERO's observations have {', '.join(known)}")
    return tuple(known[name] for name in names)
