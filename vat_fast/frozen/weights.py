"""From recipes to tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from vat_fast.frozen.costs import in_triton
from vat_fast.frozen.plan import Plan
from vat_fast.frozen.recipes import Recipe, evaluate
from vat_fast.frozen.tiles import EIGHT_BIT

SCALE = " scale"


def materialise(
    plan: Plan,
    state: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    wide: Collection[str] = (),
    eight_bit: Mapping[str, torch.dtype] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights by name, constant buffers by name) of a plan, computed in float64 and rounded once to `dtype`.

    Weights named in `wide` are rounded to float32 instead, those in `eight_bit` to 8 bits with one scale per output
    channel, which is the weight of that name with `SCALE` behind it.

    Raises:
        ValueError: the plan reads a parameter that the model does not hold.
    """

    def compute(recipe: Recipe, dtype: torch.dtype = dtype) -> Tensor:
        try:
            return evaluate(recipe, state).detach().to(device, dtype).contiguous()
        except KeyError as error:
            raise ValueError(
                f"the plan reads {error.args[0]}, which this model does not hold because its result is never used: "
                "leave the pass drop_dead_layer on"
            ) from error

    weights: dict[str, Tensor] = {}
    for name, weight in plan.weights.items():
        if eight_bit and name in eight_bit:
            from vat_fast.kernels.eight_bit import quantize_weight

            values, scales = quantize_weight(compute(weight.recipe, torch.float32), eight_bit[name])
            weights[name], weights[f"{name}{SCALE}"] = values, scales
        else:
            weights[name] = compute(weight.recipe, torch.float32 if name in wide else dtype)
    constants = {name: compute(buffer.recipe) for name, buffer in plan.buffers.items() if buffer.recipe is not None}
    return weights, constants


def vectors(plan: Plan) -> set[str]:
    """Names of the weights that the kernels read in float32: biases, norms and what patch embedding is packed from."""
    patches = {name for step in plan.steps if step.op == "patch_embed" for name in step.weights.values()}
    packed = patches if any("mean" in step.options for step in plan.steps) else set[str]()
    beside = {
        name
        for step in plan.all_steps
        if step.op in ("linear", "norm") and in_triton(step.op, step.options)
        for role, name in step.weights.items()
        if plan.weights[name].kind == "vector"
    }
    return packed | beside


def in_eight_bits(plan: Plan) -> dict[str, torch.dtype]:
    """Weights that the kernels read in 8 bits, and in which."""
    return {
        step.weights["weight"]: EIGHT_BIT[step.options["quantised"]]
        for step in plan.all_steps
        if "quantised" in step.options
    }
