"""From recipes to tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vat_fast.frozen.plan import Plan
from vat_fast.frozen.recipes import Recipe, evaluate


def materialise(
    plan: Plan, state: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights by name, constant buffers by name) of a plan, computed in float64 and rounded once.

    Raises:
        ValueError: the plan reads a parameter that the model does not hold.
    """

    def compute(recipe: Recipe) -> Tensor:
        try:
            return evaluate(recipe, state).detach().to(device, dtype).contiguous()
        except KeyError as error:
            raise ValueError(
                f"the plan reads {error.args[0]}, which this model does not hold because its result is never used: "
                "leave the pass drop_dead_layer on"
            ) from error

    weights = {name: compute(weight.recipe) for name, weight in plan.weights.items()}
    constants = {name: compute(buffer.recipe) for name, buffer in plan.buffers.items() if buffer.recipe is not None}
    return weights, constants
