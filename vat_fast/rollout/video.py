"""Videos of finished episodes, made by replaying their recorded actions: the evaluation itself renders nothing more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vat_fast.rollout.episode import SceneLike
from vat_fast.rollout.records import EpisodeKey, EpisodeRecord
from vat_fast.rollout.settings import EvaluationSettings

CONTROL_HZ = 20
FRAME_EVERY = 2
"""Steps per frame: half the control rate is smooth enough and halves the rendering."""


class ReplayError(RuntimeError):
    """A replay that ended otherwise than the recorded episode."""


def replay(
    scene: SceneLike,
    record: EpisodeRecord,
    actions: NDArray[np.float32],
    settings: EvaluationSettings,
    every: int = FRAME_EVERY,
) -> Iterator[NDArray[np.uint8]]:
    """Frames (H, W, 3) of a recorded episode, upright, its cameras side by side: one each `every` steps and the last.

    Args:
        scene: of the episode's task, with cameras.
        actions: (steps, A), as executed.
        settings: the evaluation's.

    Raises:
        ReplayError: at the end, where the replay did not succeed or fail as the record says.
    """
    scene.reset(record.init_state, displace_cm=settings.displace_cm, displace_seed=settings.seed)
    scene.settle(settings.settling_steps)
    yield _frame(scene.observe())
    done = False
    for index, action in enumerate(actions, 1):
        done = scene.step(action)
        if index % every == 0 or index == len(actions):
            yield _frame(scene.observe())
    if done != record.success:
        raise ReplayError(
            f"the replay of {record.key.name} {'succeeded' if done else 'failed'}, the episode "
            f"{'succeeded' if record.success else 'failed'}: other versions of the simulator than in the evaluation?"
        )


def write_video(path: str | Path, frames: Iterator[NDArray[np.uint8]], fps: float = CONTROL_HZ / FRAME_EVERY) -> Path:
    """Write frames as H.264 in an mp4 file that appears when it is complete; returns its path.

    Raises:
        ImportError: imageio or its ffmpeg is not installed.
    """
    try:
        import imageio.v2 as imageio
    except ImportError as error:
        raise ImportError("videos need imageio: pip install 'vat_fast[libero]'") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part.mp4")
    try:
        writer: Any = imageio.get_writer(temporary, fps=fps, codec="libx264", quality=7, macro_block_size=16)
        with writer:
            for frame in frames:
                writer.append_data(frame)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def parse_choice(choice: str) -> list[EpisodeKey] | None:
    """What `--video` says: "TASK:STATE,...", "0:3,2:17" for example; None for "first" and "failures".

    Raises:
        ValueError: anything else.
    """
    if choice in ("first", "failures"):
        return None
    keys = []
    for part in choice.split(","):
        task, colon, state = part.strip().partition(":")
        if not (colon and task.isdecimal() and state.isdecimal()):
            raise ValueError(f"videos are chosen by first, failures or TASK:STATE,... such as 0:3,2:17, got {choice!r}")
        keys.append(EpisodeKey(int(task), int(state)))
    return keys


def choose_episodes(choice: str, records: Sequence[EpisodeRecord]) -> list[EpisodeKey]:
    """The episodes to show among those that finished: those named, the first of each task, or all failures.

    Raises:
        ValueError: as `parse_choice`.
    """
    named = parse_choice(choice)
    if named is not None:
        return [record.key for record in records if record.key in named]
    if choice == "failures":
        return [record.key for record in records if not record.success]
    first: dict[int, EpisodeKey] = {}
    for record in records:
        first.setdefault(record.task, record.key)
    return list(first.values())


def _frame(observation: Mapping[str, Any]) -> NDArray[np.uint8]:
    images = [np.asarray(value) for name, value in observation.items() if name.endswith("_image")]
    # Frames come upside down from the simulator; flipped, not rotated, left is left.
    return np.concatenate([image[::-1] for image in images], axis=1)
