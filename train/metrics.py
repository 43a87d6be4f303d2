"""How far predicted actions are from the recorded ones, for each dimension and each step of the chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from vat_fast.actions import Statistics


@dataclass(frozen=True)
class ErrorTable:
    """Mean absolute errors over a number of samples.

    samples: how many, over all ranks.
    l1_table: for each step of the chunk and each dimension, normalised units, float64.
    robot_l1_table: the same in the robot's units; None where the statistics were not given.
    """

    samples: int
    l1_table: Tensor
    robot_l1_table: Tensor | None

    @property
    def l1(self) -> float:
        """Mean over steps and dimensions."""
        return float(self.l1_table.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: the mean, per dimension and per step of the chunk."""
        figures: dict[str, Any] = {
            "l1": self.l1,
            "l1_per_dimension": self.l1_table.mean(0).tolist(),
            "l1_per_step": self.l1_table.mean(1).tolist(),
        }
        if self.robot_l1_table is not None:
            figures["robot_l1_per_dimension"] = self.robot_l1_table.mean(0).tolist()
        return figures


class ActionErrors:
    """Adds up |prediction - target| over batches, without waiting for an accelerator."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count: Tensor | None = None

    @torch.no_grad()
    def add(self, prediction_BCA: Tensor, target_BCA: Tensor, valid_B: Tensor | None = None) -> None:
        """One batch, both (B, C, A) and normalised; rows where `valid_B` is False are padding.

        Raises:
            ValueError: shapes that differ.
        """
        if prediction_BCA.shape != target_BCA.shape:
            raise ValueError(
                f"prediction and target must have one shape (B, C, A), got {tuple(prediction_BCA.shape)} and "
                f"{tuple(target_BCA.shape)}"
            )
        error_BCA = (prediction_BCA.double() - target_BCA.double()).abs()
        if valid_B is None:
            count = torch.tensor(float(len(error_BCA)), dtype=torch.float64, device=error_BCA.device)
        else:
            # A product would turn a padding row's NaN into everybody's.
            error_BCA = error_BCA.masked_fill(~valid_B[:, None, None], 0.0)
            count = valid_B.sum().double()
        total = error_BCA.sum(0)
        self._sum = total if self._sum is None else self._sum + total
        self._count = count if self._count is None else self._count + count

    def result(self, statistics: Statistics | None = None) -> ErrorTable:
        """The means over all batches of all ranks; call it on every rank.

        Args:
            statistics: of the dataset, for the robot's units.

        Raises:
            ValueError: no sample was added on any rank.
        """
        if self._sum is None or self._count is None:
            raise ValueError("there are no errors yet: add a batch first")
        both = torch.cat([self._sum.flatten(), self._count.reshape(1)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(both)
        samples = round(both[-1].item())
        if not samples:
            raise ValueError("every sample that was added is padding")
        l1_table = (both[:-1] / samples).reshape(self._sum.shape).cpu()
        robot = None if statistics is None else l1_table * robot_units(statistics)
        return ErrorTable(samples, l1_table, robot)

    def reset(self) -> None:
        """Begin anew."""
        self._sum = self._count = None


def robot_units(statistics: Statistics) -> Tensor:
    """What one normalised unit is in the robot's, (A,) float64: (q99 - q01) / 2, or 1 for what is not normalised."""
    action = statistics.action
    low, high = (action.unnormalize([x] * action.dim).astype("float64") for x in (0.0, 1.0))
    return torch.from_numpy(high - low)
