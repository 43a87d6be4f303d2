"""A toy scene that needs no simulator, and small random policies."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vat_fast.actions import FieldStatistics, Statistics
from vat_fast.config import VATConfig
from vat_fast.model import VAT
from vat_fast.observation import ImageProcessing
from vat_fast.policy import Policy, PolicyConfig
from vat_fast.tasks import TaskTable

NAMES = ["push the red cube", "push the blue cube", "push the green cube"]
SIZE = 32


class ToyScene:
    """A point that the actions push about. Its image and its state tell where it is; a task is done beyond 1 m."""

    def __init__(self, task: int, trouble: Trouble) -> None:
        self.task, self.trouble = task, trouble
        self.position = np.zeros(3)
        self.init_state = -1

    def reset(self, init_state: int, displace_cm: float = 0.0, displace_seed: int = 0) -> None:
        if init_state >= 50:
            raise ValueError(f"there are 50 initial states, got {init_state}")
        self.init_state = init_state
        self.position = np.random.default_rng([self.task, init_state]).uniform(-0.1, 0.1, 3)
        if displace_cm:
            self.position += np.random.default_rng(displace_seed).uniform(-1, 1, 3) * displace_cm / 100

    def settle(self, steps: int) -> None:
        self.position *= 0.99**steps

    def step(self, action: NDArray[np.float32]) -> bool:
        self.trouble.strike(self.task, self.init_state)
        self.position = self.position + 0.05 * np.tanh(np.asarray(action[:3], np.float64))
        return bool(np.abs(self.position).max() > 1)

    def observe(self) -> dict[str, Any]:
        colour = (127 + 120 * np.sin(7 * self.position + np.arange(3))).astype(np.uint8)
        image = np.broadcast_to(colour, (SIZE, SIZE, 3)).copy()
        image[: SIZE // 2] //= 2
        state = np.concatenate([self.position, np.zeros(5)])
        return {"agentview_image": image, "robot0_eye_in_hand_image": 255 - image, "state": state}

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Trouble:
    """What goes wrong in some episode.

    kind: "kill" the process, "hang" it, or "raise" an exception.
    task, init_state: in which; init_state None: in all of the task.
    marker: a file that says how often it has happened; it stops after `times`.
    """

    kind: str = ""
    task: int = 0
    init_state: int | None = 0
    marker: str = ""
    times: int = 1

    def strike(self, task: int, init_state: int) -> None:
        if not self.kind or task != self.task or self.init_state not in (None, init_state):
            return
        path = Path(self.marker)
        count = len(path.read_text()) if path.is_file() else 0
        if count >= self.times:
            return
        path.write_text("x" * (count + 1))
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "hang":
            time.sleep(600)
        raise RuntimeError("the toy is broken")


@dataclass(frozen=True)
class ToyScenes:
    """Makes toy scenes; an evaluation's `scenes`."""

    trouble: Trouble = field(default_factory=Trouble)
    missing: bool = False

    def __call__(self, task: int) -> ToyScene:
        if self.missing:
            raise ImportError("the toy simulator is not installed")
        return ToyScene(task, self.trouble)


def statistics(dim: int, gripper: bool, seed: int) -> FieldStatistics:
    """Any statistics of a field."""
    rng = np.random.default_rng(seed)
    low, high = -rng.uniform(0.5, 1, dim), rng.uniform(0.5, 1, dim)
    mask = np.arange(dim) < dim - 1 if gripper else None
    return FieldStatistics(0 * low, 1 + 0 * low, 2 * low, 2 * high, low, high, mask)


def make_policy(names: list[str], size: int = SIZE, seed: int = 0, proprio: bool = True, **options: Any) -> Policy:
    """A small random VAT that knows these tasks. Options are of `VATConfig` and `PolicyConfig`."""
    torch.manual_seed(seed)
    execution = {name: options.pop(name) for name in ("replan_every", "temporal_ensembling") if name in options}
    config = VATConfig.from_preset(
        "vit-tiny",
        **{
            "image_size": size,
            "width": 48,
            "mlp_hidden": 64,
            "depth": 3,
            "chunk_size": 4,
            "num_tasks": len(names),
            "proprio_dim": 8 if proprio else 0,
            **options,
        },
    )
    vat = VAT(config).eval()
    numbers = Statistics("toy", statistics(7, True, 0), statistics(8, False, 1) if proprio else None, 100, 5)
    tasks = TaskTable({name: index for index, name in enumerate(names)})
    settings = PolicyConfig(image=ImageProcessing(image_size=size), tasks=tasks, statistics_key="toy", **execution)
    return Policy(vat, settings, numbers)
