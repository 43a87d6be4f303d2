"""Which values the inputs of quantised products take: a float32 run of the plan over recorded observations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vat_fast.frozen.int8 import Range
from vat_fast.frozen.plan import Plan, Step
from vat_fast.frozen.torch_executor import TorchExecutor
from vat_fast.frozen.weights import Folded


@dataclass(frozen=True)
class Calibration:
    """Recorded samples, and what runs them."""

    plan: Plan
    """In float32, of one sample."""
    samples: Iterable[Mapping[str, Tensor]]
    """Each with the plan's inputs, with a first dimension of 1."""

    def observed(self, folded: Folded) -> dict[str, Range]:
        """See `observe`; `folded` in float32."""
        return observe(self.plan, dict(folded), folded.constants(self.plan), self.samples)


@torch.inference_mode()
def observe(
    plan: Plan,
    weights: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    inputs: Iterable[Mapping[str, Tensor]],
) -> dict[str, Range]:
    """The range and mean square of every linear's input, by step and input channel.

    Args:
        plan: in float32, of one sample.
        weights, constants: of the plan, float32, by name.
        inputs: one mapping per sample with the plan's inputs, each with a first dimension of 1.

    Raises:
        ValueError: there are no inputs.
    """
    executor = _Observer(plan, weights, constants, torch.device("cpu"))
    count = 0
    for sample in inputs:
        executor.run(sample)
        count += 1
    if count == 0:
        raise ValueError("calibration has no samples; give some recorded observations, 32 or more over all tasks")
    return {name: Range(low, high, squares / runs) for name, (low, high, squares, runs) in executor.seen.items()}


class _Observer(TorchExecutor):
    """The plain executor, which also keeps what linears read."""

    def __init__(
        self, plan: Plan, weights: Mapping[str, Tensor], constants: Mapping[str, Tensor], device: torch.device
    ) -> None:
        super().__init__(plan, weights, constants, device)
        self.seen: dict[str, tuple[Tensor, Tensor, Tensor, int]] = {}

    def _linear(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor], y: Tensor) -> None:
        rows = x["x"].flatten(0, -2)
        low, high = rows.aminmax(dim=0)
        squares, runs = rows.square().mean(dim=0), 1
        if step.name in self.seen:
            before = self.seen[step.name]
            low, high = torch.minimum(low, before[0]), torch.maximum(high, before[1])
            squares, runs = squares + before[2], runs + before[3]
        self.seen[step.name] = (low, high, squares, runs)
        super()._linear(step, x, w, y)
