"""Loss and L1 on held-out episodes, with the images that a policy would see."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vat_fast.actions import Statistics
from vat_fast.config import ConfigError
from vat_fast.train.data.loader import DemonstrationLoader
from vat_fast.train.metrics import ActionErrors, ErrorTable
from vat_fast.train.step import Outcome

Forward = Callable[..., Outcome]


@dataclass(frozen=True)
class Validation:
    """What was measured on the held-out samples of one dataset.

    loss: the training loss over them: L1, or the mean squared error of the noise.
    errors: of the actions a policy would give.
    """

    loss: float
    errors: ErrorTable

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain numbers."""
        return {"loss": self.loss, "samples": self.errors.samples, **self.errors.to_dict()}


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
        samples_actions: a diffusion head denoises actions of its own for their errors; otherwise the prediction is
            one.
        device: of the model.
        seed: of a diffusion head's noise, the same at every call.
    """
    generator = torch.Generator(device)
    errors, losses = ActionErrors(), ActionErrors()
    with torch.no_grad():
        for index, batch in enumerate(loader):
            valid = batch["valid"].to(device)
            inputs = loader.prepare(batch, device)
            generator.manual_seed((seed * 1_000_003 + index) * 4099 + loader.rank)
            outcome = forward(inputs, generator)
            per_sample = outcome.prediction - outcome.target
            per_sample = (per_sample.square() if samples_actions else per_sample.abs()).flatten(1).mean(1)
            losses.add(per_sample[:, None, None], torch.zeros_like(per_sample)[:, None, None], valid)
            if samples_actions:
                outcome = forward(inputs, generator, act=True)
            errors.add(outcome.prediction, outcome.target, valid)
    loader.close()
    return Validation(losses.result().l1, errors.result(statistics))


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
