"""From recipes to tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from vat_fast.frozen.costs import in_triton
from vat_fast.frozen.plan import Plan
from vat_fast.frozen.recipes import Recipe, evaluate, rounds_once
from vat_fast.frozen.tiles import EIGHT_BIT

SCALE = " scale"


class Folded(Mapping[str, Tensor]):
    """The weights of a plan by name, each computed when it is asked for, so that one at a time need exist.

    Computed in float64 and rounded once, into memory of their own: what becomes of the model later changes nothing.

    Args:
        plan: whose weights.
        state: the model's parameters by name.
        dtype: of the weights.
        device: where to put them.
        wide: names of weights that are float32 instead.
    """

    def __init__(
        self,
        plan: Plan,
        state: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        wide: Collection[str] = (),
    ) -> None:
        self._plan, self._state, self._dtype, self._device, self._wide = plan, state, dtype, device, wide

    def __getitem__(self, name: str) -> Tensor:
        return self.computed(self._plan.weights[name].recipe, torch.float32 if name in self._wide else self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.weights)

    def __len__(self) -> int:
        return len(self._plan.weights)

    def but(self, names: Collection[str]) -> dict[str, Tensor]:
        """All of them except those named."""
        return {name: self[name] for name in self if name not in names}

    def constants(self, plan: Plan | None = None) -> dict[str, Tensor]:
        """The constant buffers, by name, of this plan or of another for the same model."""
        buffers = (plan or self._plan).buffers
        return {
            name: self.computed(buffer.recipe, self._dtype)
            for name, buffer in buffers.items()
            if buffer.recipe is not None
        }

    def computed(self, recipe: Recipe, dtype: torch.dtype) -> Tensor:
        """A recipe's value.

        Raises:
            ValueError: it reads a parameter that the model does not hold.
        """
        try:
            value = evaluate(recipe, self._state, self._arithmetic(recipe, dtype)).detach()
        except KeyError as error:
            raise ValueError(
                f"the plan reads {error.args[0]}, which this model does not hold because its result is never used: "
                "leave the pass drop_dead_layer on"
            ) from error
        # A view of a parameter would follow the model's training, and keep its file mapped.
        return value.to(self._device, dtype, copy=recipe.op in ("parameter", "rows")).contiguous()

    def _arithmetic(self, recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
        """float64, or float32 where that gives the same bits in half the memory."""
        floats = (self._state[name].dtype for name in recipe.parameters() if name in self._state)
        same = dtype == torch.float32 and rounds_once(recipe) and torch.float64 not in floats
        return torch.float32 if same else torch.float64


def materialise(folded: Folded, eight_bit: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """All weights, those named in `eight_bit` in 8 bits with one scale per output channel, which is the weight of that
    name with `SCALE` behind it."""
    weights: dict[str, Tensor] = {}
    for name, weight in folded.items():
        if name in eight_bit:
            from vat_fast.kernels.eight_bit import quantize_weight  # needs triton, which not every machine has

            weights[name], weights[f"{name}{SCALE}"] = quantize_weight(weight, eight_bit[name])
        else:
            weights[name] = weight
    return weights


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
