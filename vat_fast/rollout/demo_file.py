"""Collected demonstrations in LIBERO's official HDF5 layout; `train/data/libero_hdf5.py` reads it and describes it.

Beside the official entries there are `executed_actions` (T, 7), what was carried out where noise or a push disturbed
the expert; the group `objects` with `positions`, `places` and `gripper`, see `Demonstration`, and the attributes
`names` and `cameras` (JSON); and the attributes `observation_before_action` (obs[j] is what was seen before
actions[j]), `collection` (how the file was made, JSON), and per demonstration `init_state_index`, `episode` and
`displacement` (JSON).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np

from vat_fast.rollout.demonstration import Demonstration
from vat_fast.rollout.scene import Scene

IMAGE_KEYS = {"agentview": "agentview_rgb", "robot0_eye_in_hand": "eye_in_hand_rgb"}
"""Camera -> name of its images in LIBERO's files."""


def write_part(path: Path, demonstration: Demonstration, attributes: Mapping[str, Any]) -> None:
    """Write one demonstration to a file of its own, atomically."""
    temporary = _temporary(path)
    with h5py.File(temporary, "w") as f:
        _fill(f.create_group("demo"), demonstration, attributes)
    os.replace(temporary, path)


def merge_parts(path: Path, parts: Sequence[Path], attributes: Mapping[str, Any]) -> None:
    """Write the file of a task from its parts, in their order, atomically.

    Args:
        attributes: of `data`, see `task_attributes`.
    """
    temporary = _temporary(path)
    total = 0
    with h5py.File(temporary, "w") as f:
        data = f.create_group("data")
        for index, part in enumerate(parts):
            with h5py.File(part, "r") as source:
                source.copy("demo", data, f"demo_{index}")
                total += int(source["demo"].attrs["num_samples"])
        for name, value in {**attributes, "num_demos": len(parts), "total": total}.items():
            data.attrs[name] = value
    os.replace(temporary, path)


def split_parts(path: Path, part: Callable[[int], Path]) -> dict[str, Any]:
    """Undo `merge_parts`: write each demonstration to a file of its own again, atomically; `path` stays.

    Args:
        path: a file of `merge_parts`.
        part: where the part of an episode goes.

    Returns:
        The attributes of `data` that were given to `merge_parts`.
    """
    with h5py.File(path, "r") as f:
        for demo in f["data"].values():
            file = part(int(demo.attrs["episode"]))
            temporary = _temporary(file)
            with h5py.File(temporary, "w") as target:
                f.copy(demo, target, "demo")
            os.replace(temporary, file)
        attributes = {name: np.asarray(value).item() for name, value in f["data"].attrs.items()}
    return {name: value for name, value in attributes.items() if name not in ("num_demos", "total")}


def task_attributes(scene: Scene, collection: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of `data` for a scene's task.

    Args:
        collection: how the demonstrations were made, as values JSON knows.
    """
    env, files = scene.control_env, scene.files
    bddl = f"bddl_files/{files.suite}/{files.bddl.name}"
    words = {
        "problem_name": env.problem_name,
        "domain_name": env.domain_name,
        "language_instruction": scene.task_name,
    }
    kwargs = {
        "robots": ["Panda"],
        "controller_configs": env.env.robots[0].controller_config["type"],
        "camera_names": list(scene.cameras),
        "camera_heights": scene.size,
        "camera_widths": scene.size,
        "control_freq": 20,
        "bddl_file_name": bddl,
    }
    env_args = {"type": 1, "env_name": env.problem_name, "bddl_file": bddl, "env_kwargs": kwargs}
    return {
        "env_name": env.problem_name,
        "problem_info": json.dumps(words),
        "macros_image_convention": "opengl",
        "tag": "libero-v1",
        "bddl_file_name": bddl,
        "bddl_file_content": files.bddl.read_text(encoding="utf-8"),
        "env_args": json.dumps(env_args),
        "observation_before_action": True,
        "collection": json.dumps(dict(collection)),
    }


def read_collection(path: Path) -> Any:
    """How a file was made: the `collection` that it was written with; None where it says nothing."""
    with h5py.File(path, "r") as f:
        text = f["data"].attrs.get("collection") if "data" in f else None
    return None if text is None else json.loads(text)


def _temporary(path: Path) -> Path:
    """Where a file is written before it gets its name; its own for each process, of which one may outlive a kill."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def _fill(group: Any, demo: Demonstration, attributes: Mapping[str, Any]) -> None:
    robot, done = demo.robot, np.zeros(len(demo), np.uint8)
    done[-1] = 1
    group["actions"] = demo.actions
    group["executed_actions"] = demo.executed
    group["states"] = demo.states
    group["robot_states"] = np.hstack([robot["gripper_qpos"], robot["eef_pos"], robot["eef_quat"]])
    group["rewards"], group["dones"] = done, done
    obs = group.create_group("obs")
    for camera, images in demo.images.items():
        chunk = (min(8, len(images)), *images.shape[1:])
        key = IMAGE_KEYS.get(camera, f"{camera}_rgb")
        obs.create_dataset(key, data=images, chunks=chunk, compression="gzip", compression_opts=1)
    obs["ee_pos"], obs["ee_ori"] = robot["eef_pos"], robot["eef_ori"]
    obs["ee_states"] = np.hstack([robot["eef_pos"], robot["eef_ori"]])
    obs["gripper_states"], obs["joint_states"] = robot["gripper_qpos"], robot["joint_pos"]
    objects = group.create_group("objects")
    objects["positions"], objects["places"], objects["gripper"] = demo.positions, demo.places, demo.gripper
    objects.attrs["names"] = json.dumps(demo.objects)
    objects.attrs["cameras"] = json.dumps([IMAGE_KEYS.get(camera, f"{camera}_rgb") for camera in demo.images])
    own = {"num_samples": len(demo), "model_file": demo.model_xml, "init_state": demo.states[0]}
    for name, value in {**own, "displacement": json.dumps(demo.displacement), **attributes}.items():
        group.attrs[name] = value
