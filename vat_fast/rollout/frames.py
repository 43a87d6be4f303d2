"""Single images of scenes that no demonstration shows: everything moved, the hand anywhere, and where each object is.

They teach a vision stream to find objects before it learns to act (`vat_fast.train.pretrain`). A frame costs a
rendering and no episode. Files of 250 frames:

    frames          attrs: names (JSON, of the O objects), cameras (JSON), collection (JSON: how it was made)
      <camera>      (N, S, S, 3) uint8, as rendered
      positions     (N, O, 3) float32, see `ObjectLocator`
      places        (N, V, O, 3) float32
      gripper       (N, 3) float32, the point between the finger pads
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vat_fast.rollout.demo_file import IMAGE_KEYS
from vat_fast.rollout.displace import move_objects, plan_displacement
from vat_fast.rollout.experts import Expert
from vat_fast.rollout.experts.disturb import Disturbance, Disturber
from vat_fast.rollout.install_check import check_simulator
from vat_fast.rollout.locate import ObjectLocator
from vat_fast.rollout.render import RenderSettings
from vat_fast.rollout.scene import SETTLING_STEPS, Scene
from vat_fast.rollout.suites import check_choice, max_steps, suite_name
from vat_fast.rollout.workers import GivenUp, run_jobs

FRAMES_PER_FILE = 250
EMPTY_PHASES = ("approach", "descend", "retreat")
"""Of the expert: its hand holds nothing, so that it can be put into another scene."""
_JOINT_NOISE = 0.04
"""Standard deviation around the poses that the expert goes through, radians."""
_TRIES = 20
"""To place the hand where it touches nothing."""


@dataclass(frozen=True)
class FrameSettings:
    """Which frames are made; each file is decided by these and its number alone.

    Args:
        suite, tasks, init_states, size, render, seed: as in `CollectSettings`.
        frames: per task, rounded up to whole files.
        displace_cm: how far each object may move from its place.

    Raises:
        ValueError: an impossible value, or an unknown suite or task.
        SimulatorError: the simulator is not installed.
    """

    suite: str
    tasks: tuple[int, ...]
    frames: int = 1000
    init_states: tuple[int, ...] = tuple(range(40))
    size: int = 128
    render: str = "official"
    displace_cm: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_simulator()
        object.__setattr__(self, "suite", suite_name(self.suite))
        check_choice(self.suite, self.tasks, self.init_states)
        if self.frames < 1 or self.size < 16:
            raise ValueError(f"there must be at least 1 frame of 16 pixels, got {self.frames} of {self.size}")
        RenderSettings.named(self.render)


class FrameFile(NamedTuple):
    """One file to make."""

    task: int
    number: int

    def path(self, folder: Path) -> Path:
        """Where it is."""
        return folder / f"task_{self.task:02d}_{self.number:03d}.hdf5"


def collect_frames(
    settings: FrameSettings, folder: Path, *, processes: int = 2, timeout: float = 300.0, progress: bool = True
) -> list[Path]:
    """Make the frames' files in `folder`; those that are there stay.

    Returns:
        All files.

    Raises:
        NoExpertError: the hand's poses come from the expert, which cannot do a task.
        RuntimeError: a file could not be made: its simulator died or hung twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [FrameFile(task, n) for task in settings.tasks for n in range(-(-settings.frames // FRAMES_PER_FILE))]
    missing = [file for file in files if not file.path(folder).exists()]
    make = functools.partial(_FrameMaker, settings, folder)
    with tqdm(total=len(files), initial=len(files) - len(missing), unit="file", disable=not progress) as bar:
        for outcome in run_jobs(missing, make, processes, timeout=timeout):
            if isinstance(outcome, GivenUp):
                raise RuntimeError(f"{outcome.job.path(folder)} could not be made: {outcome.reason}; run it again")
            bar.update()
    return [file.path(folder) for file in files]


class _FrameMaker:
    """Makes files in a worker process; the scene of the last task stays, and the poses with it."""

    def __init__(self, settings: FrameSettings, folder: Path) -> None:
        self._settings, self._folder = settings, folder
        self._scene: Scene | None = None
        self._poses: list[NDArray[np.float64]] = []

    def __call__(self, file: FrameFile) -> None:
        settings = self._settings
        rng = np.random.default_rng([settings.seed, zlib.crc32(settings.suite.encode()), *file])
        scene = self._scene_of(file.task)
        scene.reset(int(rng.choice(settings.init_states)))
        scene.settle(SETTLING_STEPS)
        settled, locator = scene.sim.get_state(), ObjectLocator(scene)
        rows: list[dict[str, Any]] = []
        while len(rows) < FRAMES_PER_FILE:
            scene.sim.set_state(settled)
            scene.sim.forward()
            seeds = (settings.seed, file.number, len(rows))
            move_objects(scene, plan_displacement(scene, settings.displace_cm, seeds, everything=True))
            place_hand(scene, self._poses, rng)
            seen = {camera: scene.observe()[f"{camera}_image"] for camera in scene.cameras}
            grip = locator.gripper()
            rows.append({**seen, "positions": locator.positions(), "places": locator.places(), "gripper": grip})
        self._write(file.path(self._folder), rows, scene, locator.names)

    def _scene_of(self, task: int) -> Scene:
        if self._scene is None or self._scene.task_id != task:
            if self._scene is not None:
                self._scene.close()
            s = self._settings
            self._scene = Scene(s.suite, task, size=s.size, render=RenderSettings.named(s.render))
            self._poses = expert_poses(self._scene, s.init_states[:4], np.random.default_rng([s.seed, task]))
        return self._scene

    def _write(self, path: Path, rows: list[dict[str, Any]], scene: Scene, names: tuple[str, ...]) -> None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        with h5py.File(temporary, "w") as f:
            group = f.create_group("frames")
            for key in rows[0]:
                values = np.stack([row[key] for row in rows])
                if values.ndim == 4 and values.dtype == np.uint8:
                    chunk = (min(10, len(values)), *values.shape[1:])
                    group.create_dataset(IMAGE_KEYS[key], data=values, chunks=chunk, compression="lzf")
                else:
                    group[key] = values
            group.attrs["names"] = json.dumps(names)
            group.attrs["cameras"] = json.dumps([IMAGE_KEYS[camera] for camera in scene.cameras])
            group.attrs["collection"] = json.dumps(dataclasses.asdict(self._settings))
        os.replace(temporary, path)


def expert_poses(scene: Scene, init_states: tuple[int, ...], rng: np.random.Generator) -> list[NDArray[np.float64]]:
    """Joint positions (9,) of arm and fingers that a disturbed expert goes through with an empty hand.

    Raises:
        NoExpertError: no expert can do the scene's task.
    """
    robot, poses = scene.env.robots[0], []
    indices = [*robot._ref_joint_pos_indexes, *robot._ref_gripper_joint_pos_indexes]
    for turn, state in enumerate(init_states):
        scene.reset(state, displace_cm=8.0, displace_seed=turn)
        scene.settle(SETTLING_STEPS)
        disturber = Disturber(Disturbance(noise=0.5, pushes=True), rng)
        for steps, command in enumerate(Expert(scene).commands()):
            if steps == max_steps(scene.suite) // 2:
                break
            scene.step(disturber.executed(command))
            if command.phase in EMPTY_PHASES:
                poses.append(np.array(scene.sim.data.qpos[indices]))
    return poses


def place_hand(scene: Scene, poses: list[NDArray[np.float64]], rng: np.random.Generator) -> None:
    """Put the arm near one of the poses, where it touches nothing if such a one is found in a few tries."""
    robot = scene.env.robots[0]
    indices = [*robot._ref_joint_pos_indexes, *robot._ref_gripper_joint_pos_indexes]
    for _ in range(_TRIES):
        pose = poses[rng.integers(len(poses))].copy()
        pose[:7] += rng.normal(0, _JOINT_NOISE, 7)
        scene.sim.data.qpos[indices] = pose
        scene.sim.forward()
        if not _robot_touches(scene):
            return


def _robot_touches(scene: Scene) -> bool:
    model, data = scene.sim.model._model, scene.sim.data._data
    for contact in data.contact[: data.ncon]:
        mine = [model.body(model.geom_bodyid[g]).name.startswith(("robot0", "gripper0")) for g in contact.geom]
        if mine[0] != mine[1]:
            return True
    return False
