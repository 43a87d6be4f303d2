"""Loss and L1 on held-out episodes, with the images that a policy would see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vat_fast.actions import Statistics
from vat_fast.config import ConfigError
from vat_fast.policy import Policy
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


@dataclass(frozen=True)
class RolloutOptions:
    """LIBERO episodes that a policy in training plays in the simulator.

    suite: "libero_spatial" for example.
    episodes: of each task, from its first official initial states.
    tasks: indices in the suite; None: all.
    processes: simulators side by side.

    Raises:
        ConfigError: a number below 1.
    """

    suite: str
    episodes: int = 2
    tasks: list[int] | None = None
    processes: int = 2

    def __post_init__(self) -> None:
        for name in ("episodes", "processes"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"validate.rollout.{name} must be a whole number of at least 1, got {value!r}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RolloutOptions:
        """From the configuration's mapping.

        Raises:
            ConfigError: an unknown key, no suite, or a value that cannot be.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown key validate.rollout.{key}; it has {', '.join(known)}")
        if "suite" not in values:
            raise ConfigError("validate.rollout.suite is missing: libero_spatial for example")
        return cls(**values)


def check_rollout(options: RolloutOptions) -> None:
    """Raise one ConfigError, before anything is trained, where the episodes could not be played."""
    try:
        from vat_fast.rollout.install_check import check_simulator

        check_simulator(rendering=True)
        _rollout_settings(options)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"validate.rollout cannot run here: {error}; set it to null") from error


def rollout(policy: Policy, options: RolloutOptions) -> dict[str, Any]:
    """Play the episodes in this process's simulators: success rate, episodes, and seconds."""
    from vat_fast.rollout.libero import evaluate_libero

    result = evaluate_libero(policy, _rollout_settings(options), processes=options.processes, progress=False)
    return {"success_rate": result.success_rate, "episodes": len(result.records), "seconds": result.seconds}


def _rollout_settings(options: RolloutOptions) -> Any:
    from vat_fast.rollout.libero import libero_settings

    return libero_settings(options.suite, tasks=options.tasks, init_states=range(options.episodes))
