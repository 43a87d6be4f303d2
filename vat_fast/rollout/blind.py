"""A policy that sees nothing: what proprioception and the task's name alone achieve.

It belongs beside every success rate. In libero_object no object moves more than about 2 cm between the official initial
states, so that a policy without eyes can succeed; only what is above its rate shows that a policy sees.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from vat_fast.actions import (
    GripperConvention,
    Statistics,
    StatisticsError,
    check_gripper,
    gripper_command,
    load_statistics,
    save_statistics,
)
from vat_fast.chunks import ChunkExecutor
from vat_fast.config import ConfigError
from vat_fast.files import write_bytes, write_text
from vat_fast.observation import check_fields, read_proprio
from vat_fast.tasks import TaskError, TaskTable

BLIND_FILE = "blind.json"
WEIGHTS_FILE = "blind.safetensors"
STATISTICS_FILE = "dataset_statistics.json"


@dataclass(frozen=True)
class BlindConfig:
    """Sizes and execution of a `BlindPolicy`.

    tasks: names and ids.
    chunk_size, action_dim, proprio_dim: as in `VATConfig`.
    hidden: width of the two hidden layers.
    gripper, replan_every, temporal_ensembling: as in `PolicyConfig`.

    Raises:
        ConfigError: an impossible value.
    """

    tasks: TaskTable
    chunk_size: int = 8
    action_dim: int = 7
    proprio_dim: int = 8
    hidden: int = 256
    gripper: GripperConvention = "libero"
    replan_every: int | None = None
    temporal_ensembling: float | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_size", "action_dim", "proprio_dim", "hidden"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(self.tasks, TaskTable) or not self.tasks:
            raise ConfigError(f"tasks must be a TaskTable with at least one task, got {self.tasks!r}")
        try:
            check_gripper(self.gripper)
            self.new_executor()
        except (TypeError, ValueError) as error:
            raise ConfigError(str(error)) from error

    @property
    def cameras(self) -> tuple[str, ...]:
        """None: nothing is rendered for it."""
        return ()

    def new_executor(self) -> ChunkExecutor:
        """As `Policy.new_executor`."""
        every = self.replan_every
        if every is None:
            every = self.chunk_size if self.temporal_ensembling is None else 1
        return ChunkExecutor(self.chunk_size, every, self.temporal_ensembling)

    def to_dict(self) -> dict[str, Any]:
        """The fields as values JSON knows."""
        return {**dataclasses.asdict(self), "tasks": self.tasks.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BlindConfig:
        """The configuration that `to_dict` gave.

        Raises:
            ConfigError: unknown field or impossible value.
        """
        check_fields(cls, values)
        try:
            return cls(**{**values, "tasks": TaskTable.from_dict(values.get("tasks"))})
        except TaskError as error:
            raise ConfigError(f"tasks: {error}") from error


class BlindPolicy(nn.Module):
    """A multi-layer perceptron from proprioception and task to a chunk of actions.

    It has what `Policy` has for rollouts (`predict`, `new_executor`, `to_robot`, `task_id`) and trains on the same
    targets: `loss` takes the batches that `VAT.loss` takes and leaves their images alone.

    Args:
        config: sizes, tasks, execution.
        statistics: of the dataset; they need a proprio entry.

    Raises:
        ConfigError: configuration and statistics do not fit together.
    """

    def __init__(self, config: BlindConfig, statistics: Statistics) -> None:
        super().__init__()
        if statistics.proprio is None or statistics.proprio.dim != config.proprio_dim:
            have = "none" if statistics.proprio is None else str(statistics.proprio.dim)
            raise ConfigError(
                f"a blind policy reads {config.proprio_dim} numbers of proprio, the statistics have {have}"
            )
        if statistics.action.dim != config.action_dim:
            raise ConfigError(
                f"the policy's actions have {config.action_dim} numbers, the statistics {statistics.action.dim}"
            )
        self.config, self.statistics = config, statistics
        self._proprio = statistics.proprio
        self.task_embedding = nn.Embedding(max(config.tasks.values()) + 1, config.hidden)
        self.input = nn.Linear(config.proprio_dim, config.hidden)
        self.layers = nn.Sequential(
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.chunk_size * config.action_dim),
        )

    @property
    def chunk_size(self) -> int:
        """C, actions per prediction."""
        return self.config.chunk_size

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.input.weight.device

    def forward(self, proprio_BP: Tensor, task_id_B: Tensor) -> Tensor:
        """Normalised proprioception (B, P) and task ids (B,) -> normalised actions (B, C, A)."""
        hidden = self.input(proprio_BP) + self.task_embedding(task_id_B)
        return self.layers(hidden).unflatten(-1, (self.config.chunk_size, self.config.action_dim))

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean absolute error of a training batch: `proprio` (B, P), `task_id` (B,), `actions` (B, C, A).

        Raises:
            ValueError: an entry is missing.
        """
        missing = [name for name in ("proprio", "task_id", "actions") if name not in batch]
        if missing:
            raise ValueError(f"the batch has no {', '.join(missing)}; it has {', '.join(batch)}")
        return (self(batch["proprio"], batch["task_id"]) - batch["actions"]).abs().mean()

    def predict(
        self,
        observations: Sequence[Mapping[str, Any]],
        tasks: str | int | Sequence[str | int],
        generator: torch.Generator | None = None,
    ) -> NDArray[np.float32]:
        """As `Policy.predict`: normalised actions (B, C, A). Nothing in it is random; `generator` is not used.

        Raises:
            ObservationError, TaskError: as `Policy.act`.
        """
        single = isinstance(tasks, (str, int))
        each = [tasks] * len(observations) if single else cast("Sequence[str | int]", tasks)
        ids = torch.tensor([self.task_id(cast("str | int", task)) for task in each], device=self.device)
        state = [self._proprio.normalize(read_proprio(o, self.config.proprio_dim)) for o in observations]
        with torch.inference_mode():
            return self(torch.from_numpy(np.stack(state)).to(self.device), ids).float().cpu().numpy()

    def new_executor(self) -> ChunkExecutor:
        """As `Policy.new_executor`."""
        return self.config.new_executor()

    def to_robot(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """As `Policy.to_robot`."""
        return gripper_command(self.statistics.action.unnormalize(actions), self.config.gripper)

    def task_id(self, task: str | int) -> int:
        """The id of a task given by name or id.

        Raises:
            TaskError: unknown.
        """
        return self.config.tasks.id(task)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write blind.safetensors, dataset_statistics.json and blind.json, each replaced atomically."""
        folder = Path(folder)
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_bytes(folder / WEIGHTS_FILE, save(weights))
        save_statistics(folder / STATISTICS_FILE, [self.statistics])
        # blind.json last: where it is, the rest is.
        write_text(folder / BLIND_FILE, json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> BlindPolicy:
        """The policy that `save_pretrained` wrote, in eval mode.

        Raises:
            ConfigError, StatisticsError: files that do not fit together.
            FileNotFoundError: no such policy.
        """
        folder = Path(folder)
        config = BlindConfig.from_dict(json.loads((folder / BLIND_FILE).read_text(encoding="utf-8")))
        datasets = load_statistics(folder / STATISTICS_FILE)
        if len(datasets) != 1:
            raise StatisticsError(f"{folder / STATISTICS_FILE} must have one dataset, got {', '.join(datasets)}")
        policy = cls(config, next(iter(datasets.values())))
        policy.load_state_dict(load_file(folder / WEIGHTS_FILE))
        return policy.eval()
