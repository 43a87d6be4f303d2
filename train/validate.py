"""Loss and L1 on held-out episodes, with the images that a policy would see."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from vat_fast.actions import Statistics
from vat_fast.config import ConfigError
from vat_fast.train.data.loader import DemonstrationLoader
from vat_fast.train.step import Outcome

Forward = Callable[..., Outcome]


@dataclass(frozen=True)
class Validation:
    """What was measured on the held-out samples of one dataset.

    samples: how many.
    loss: the training loss over them: L1, or the mean squared error of the noise.
    l1_table: mean |predicted - recorded action| for each step of the chunk and each dimension, normalised, float64.
    robot_l1_table: the same in the robot's units.
    """

    samples: int
    loss: float
    l1_table: Tensor
    robot_l1_table: Tensor

    @property
    def l1(self) -> float:
        """Mean of `l1_table`."""
        return float(self.l1_table.mean())

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain numbers: means, per dimension and per step of the chunk."""
        return {
            "samples": self.samples,
            "loss": self.loss,
            "l1": self.l1,
            "l1_per_dimension": self.l1_table.mean(0).tolist(),
            "l1_per_step": self.l1_table.mean(1).tolist(),
            "robot_l1_per_dimension": self.robot_l1_table.mean(0).tolist(),
        }


def validate(
    forward: Forward,
    loader: DemonstrationLoader,
    statistics: Statistics,
    *,
    samples_actions: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Validation:
    """Measure one epoch of `loader` over all ranks; every rank gets the result.

    Args:
        forward: `TrainingModel`, or the engine around it, in eval mode.
        loader: unshuffled, with padding rows marked in `valid`.
        statistics: of the dataset, for the robot's units.
        samples_actions: a diffusion head denoises actions of its own for the L1; otherwise the prediction is one.
        device: of the model.
        seed: of a diffusion head's noise, the same at every call.
    """
    generator = torch.Generator(device)
    sums: dict[str, Tensor] = {}
    with torch.no_grad():
        for index, batch in enumerate(loader):
            valid = batch["valid"].to(device)
            inputs = loader.prepare(batch, device)
            generator.manual_seed((seed * 1_000_003 + index) * 4099 + loader.rank)
            outcome = forward(inputs, generator)
            error = outcome.prediction - outcome.target
            per_sample = (error.square() if samples_actions else error.abs()).flatten(1).mean(1)
            actions = forward(inputs, generator, act=True).prediction if samples_actions else outcome.prediction
            l1_BCA = (actions - inputs["actions"]).abs()[valid].double()
            _add(sums, "count", valid.sum().double())
            _add(sums, "loss", per_sample[valid].double().sum())
            _add(sums, "l1", l1_BCA.sum(0))
    loader.close()
    if dist.is_initialized() and dist.get_world_size() > 1:
        for value in sums.values():
            dist.all_reduce(value)
    count = sums["count"].item()
    l1_table = (sums["l1"] / count).cpu()
    return Validation(round(count), sums["loss"].item() / count, l1_table, l1_table * units(statistics))


def units(statistics: Statistics) -> Tensor:
    """Robot units per normalised unit, (A,) float64: (q99 - q01) / 2, or 1 for what is not normalised."""
    action = statistics.action
    low, high = action.unnormalize([0.0] * action.dim), action.unnormalize([1.0] * action.dim)
    return torch.from_numpy(high.astype("float64") - low.astype("float64"))


def rollout_hook(arguments: Mapping[str, Any] | None) -> Callable[..., Mapping[str, Any]] | None:
    """`vat_fast.rollout.rollout_during_training`, which plays episodes with a policy, or None where not asked for.

    Raises:
        ConfigError: asked for, and it is not there.
    """
    if arguments is None:
        return None
    if importlib.util.find_spec("vat_fast.rollout") is None:
        raise ConfigError("validate.rollout needs the package vat_fast.rollout, which is not installed; set it to null")
    from vat_fast import rollout  # type: ignore[attr-defined, unused-ignore]

    hook = getattr(rollout, "rollout_during_training", None)
    if hook is None:
        raise ConfigError("this vat_fast.rollout cannot be called during training; set validate.rollout to null")
    return hook  # type: ignore[no-any-return]


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = value if name not in sums else sums[name] + value
