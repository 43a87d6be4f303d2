"""Runs a plan on CPUs with PyTorch alone: oneDNN's matrix products on weights packed once, the rest as PyTorch has it.

Packed products are 1.3 to 1.45 times as fast as `F.linear` in float32 and 1.1 times in bfloat16 (so400m shapes, 2-core
AVX-512), with GELU computed while the result is in registers. Their residual form is not used: it costs a fixed
millisecond a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vat_fast.frozen.plan import Plan, Step
from vat_fast.frozen.torch_executor import DTYPES, TorchExecutor, view

Packed = dict[tuple[str, tuple[int, int] | None], Tensor]
"""(weight, rows) -> packed weight."""

_POST = {"relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), None: ("none", "")}


_NARROWEST = 16
"""Inputs of fewer numbers (a noisy action, proprioception) stay with `F.linear`; oneDNN refuses some of them."""


def pack(plan: Plan, weights: dict[str, Tensor], rows: int) -> Packed:
    """Every linear's weight in oneDNN's layout for `rows` rows of input; the originals leave `weights`."""
    packed: Packed = {}
    for step in plan.all_steps:
        if step.op == "linear" and plan.weights[step.weights["weight"]].shape[1] >= _NARROWEST:
            name, part = step.weights["weight"], step.options.get("rows")
            if (name, part) not in packed:
                weight = weights[name] if part is None else weights[name][slice(*part)]
                packed[name, part] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    for name in {name for name, _ in packed}:
        del weights[name]
    return packed


class OneDNNExecutor(TorchExecutor):
    """A plan bound to packed weights.

    Args:
        plan: any plan without 8-bit steps, in float32 or bfloat16.
        weights: as `weights.materialise` gives them, without what is packed.
        constants: values of the plan's constant buffers.
        packed: weights of the linears; shared by the plans of all batch sizes.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, Tensor], constants: Mapping[str, Tensor], packed: Packed
    ) -> None:
        self._packed = packed
        # Results are not copied into place but replace the tensor of their buffer, so memory cannot be placed before.
        super().__init__(plan.replace(storage={}), weights, constants, torch.device("cpu"))

    def _bind(self, step: Step) -> Callable[[], None]:
        (out,) = step.outputs.values()
        whole = out.tokens is None and out.columns is None and out.buffer != "actions"
        weights = {role: self.weights[name] for role, name in step.weights.items() if name in self.weights}
        compute, tensors = getattr(self, f"_{step.op}"), self.tensors
        inputs, shape = tuple(step.inputs.items()), self.plan.shape(out)
        dtype = DTYPES[self.plan.buffers[out.buffer].dtype]

        def run() -> None:
            y = compute(step, {role: view(tensors[access.buffer], access) for role, access in inputs}, weights)
            if whole:
                tensors[out.buffer] = y.view(shape).to(dtype)
            else:
                view(tensors[out.buffer], out).copy_(y.view(shape))

        return run

    def _linear(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        rows = step.options.get("rows")
        if (step.weights["weight"], rows) not in self._packed:
            return super()._linear(step, x, w)
        bias = w["bias"] if rows is None else w["bias"][slice(*rows)]
        post, algorithm = _POST[step.options.get("activation")]
        packed = self._packed[step.weights["weight"], rows]
        y = torch.ops.mkldnn._linear_pointwise(x["x"].contiguous(), packed, bias, post, [], algorithm)
        if "scale" in w:
            y.mul_(w["scale"])
        return y.add_(x["residual"]) if "residual" in x else y
