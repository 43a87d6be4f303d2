"""Small demonstrations in LIBERO's own HDF5 layout, which a VAT can learn in a minute: for smoke runs and tests.

A hand moves over a table to one of two coloured discs; the task says which, and the table's colour says how the hand
turns. The action is a function of what the images show and of the task: a model's loss falls far below what the best
constant action has, at once for the colour, later for the places.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np
from numpy.typing import NDArray

from vat_fast.config import ConfigError

TASKS = ("touch the red disc", "touch the blue disc")
_COLOURS = np.array([[210, 50, 40], [40, 70, 210]], np.float32)
_HAND = np.array([235, 235, 90], np.float32)
_TABLE = np.array([125, 115, 105], np.float32)
_SPEED = 0.03


@dataclass(frozen=True)
class SyntheticOptions:
    """How many demonstrations of what size.

    demos: per task.
    steps: of each demonstration.
    image_size: side of the square images.
    seed: of everything.

    Raises:
        ConfigError: a number below 1, or fewer than 2 steps.
    """

    demos: int = 8
    steps: int = 24
    image_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("demos", 1), ("steps", 2), ("image_size", 8), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"synthetic {name} must be a whole number of at least {least}, got {value!r}")


def write_demonstrations(folder: Path, options: SyntheticOptions | None = None) -> None:
    """Write one HDF5 file per task into `folder`, which appears complete or not at all.

    As in the official files, obs[j] is recorded after actions[j] and images are upside down.

    Raises:
        FileExistsError: there is such a folder already.
    """
    options = options or SyntheticOptions()
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or choose another folder")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    for index, task in enumerate(TASKS):
        with h5py.File(partial / f"{task.replace(' ', '_')}_demo.hdf5", "w") as file:
            data = file.create_group("data")
            data.attrs["problem_info"] = json.dumps({"language_instruction": task})
            data.attrs["num_demos"] = options.demos
            data.attrs["total"] = options.demos * options.steps
            for number in range(options.demos):
                _write_demo(data.create_group(f"demo_{number}"), index, options, rng)
    partial.rename(folder)


def demonstration(
    task: int, steps: int, size: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], dict[str, NDArray[np.uint8]]]:
    """One demonstration: before each of `steps` actions, what was seen.

    Returns:
        actions (T, 7): (x, y) towards the disc, z down with nearness, three turns by the table's colour, gripper
        -1 open, +1 closed; states (T, 8); images {main, wrist} (T, size, size, 3).
    """
    discs = rng.uniform(0.2, 0.8, (2, 2))
    hand = rng.uniform(0.1, 0.9, 2)
    turn = rng.uniform(-1, 1, 3)
    table = _TABLE + 60 * turn
    actions, states = np.zeros((steps, 7), np.float32), np.zeros((steps, 8), np.float32)
    images = {name: np.zeros((steps, size, size, 3), np.uint8) for name in ("main", "wrist")}
    for step in range(steps):
        way = discs[task] - hand
        distance = float(np.hypot(*way))
        move = way * min(1.0, _SPEED / max(distance, 1e-6))
        images["main"][step] = _draw(table, discs, hand, np.zeros(2), 1.0, size, rng)
        images["wrist"][step] = _draw(table, discs, hand, hand - 0.25, 0.5, size, rng)
        closed = 1.0 if distance < 0.1 else -1.0
        actions[step] = [*(move / _SPEED), 1 - 2 * distance, *turn, closed]
        states[step] = [*hand, distance, 0, 0, 0, 0.04 * (closed < 0), -0.04 * (closed < 0)]
        hand = hand + move
    return actions, states, images


def _draw(
    table: NDArray[np.float64],
    discs: NDArray[np.float64],
    hand: NDArray[np.float64],
    corner: NDArray[np.float64],
    width: float,
    size: int,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """The square of the table with this corner and width, (size, size, 3)."""
    grid = (np.arange(size) + 0.5) / size * width
    x, y = corner[0] + grid[None, :], corner[1] + grid[:, None]
    image = np.broadcast_to(table, (size, size, 3)) + rng.normal(0, 4, (size, size, 1))
    for place, colour, radius in ((discs[0], _COLOURS[0], 0.1), (discs[1], _COLOURS[1], 0.1), (hand, _HAND, 0.06)):
        image = np.where(((x - place[0]) ** 2 + (y - place[1]) ** 2 < radius**2)[..., None], colour, image)
    return np.clip(image, 0, 255).astype(np.uint8)


def _write_demo(group: h5py.Group, task: int, options: SyntheticOptions, rng: np.random.Generator) -> None:
    steps = options.steps
    actions, states, images = demonstration(task, steps + 1, options.image_size, rng)
    # obs[j] is what was seen after actions[j].
    group.attrs["num_samples"] = steps
    done = np.zeros(steps, np.uint8)
    done[-1] = 1
    group["actions"] = actions[:-1].astype(np.float64)
    group["rewards"], group["dones"] = done, done
    obs = group.create_group("obs")
    obs["agentview_rgb"] = images["main"][1:, ::-1, ::-1]
    obs["eye_in_hand_rgb"] = images["wrist"][1:, ::-1, ::-1]
    obs["ee_states"], obs["gripper_states"] = states[1:, :6], states[1:, 6:]
