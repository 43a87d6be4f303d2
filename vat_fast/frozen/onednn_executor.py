"""Runs a plan on CPUs with PyTorch alone: oneDNN's matrix products on weights packed once, the rest as PyTorch has it.

Packed products are 1.3 to 1.45 times as fast as `F.linear` in float32 and 1.1 times in bfloat16 (so400m shapes, 2-core
AVX-512), with GELU computed while the result is in registers. Their residual form is not used: it costs a fixed
millisecond a call. They have no form that writes into a given tensor: each brings its result's memory along, which goes
back to the allocator after its last reader. They are all that a step in float32 allocates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vat_fast.frozen.memory import reuse_buffers
from vat_fast.frozen.plan import Access, Plan, Step
from vat_fast.frozen.torch_executor import TorchExecutor, view

Packed = dict[tuple[str, tuple[int, int] | None], Tensor]
"""(weight, rows) -> packed weight."""

_POST = {"relu": ("relu", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), None: ("none", "")}


_NARROWEST = 16
"""Inputs of fewer numbers (a noisy action, proprioception) stay with `addmm`; oneDNN refuses some of them."""


def pack(plan: Plan, weights: Mapping[str, Tensor], rows: int) -> Packed:
    """Every linear's weight in oneDNN's layout for `rows` rows of input."""
    packed: Packed = {}
    for step in plan.all_steps:
        if step.op == "linear" and plan.weights[step.weights["weight"]].shape[1] >= _NARROWEST:
            name, part = step.weights["weight"], step.options.get("rows")
            if (name, part) not in packed:
                weight = weights[name] if part is None else weights[name][slice(*part)]
                packed[name, part] = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


class OneDNNExecutor(TorchExecutor):
    """A plan bound to packed weights.

    Args:
        plan: any plan without 8-bit steps, in float32 or bfloat16.
        weights: those of the plan that are not packed.
        constants: values of the plan's constant buffers.
        packed: weights of the linears; shared by the plans of all batch sizes.
    """

    def __init__(
        self, plan: Plan, weights: Mapping[str, Tensor], constants: Mapping[str, Tensor], packed: Packed
    ) -> None:
        self._packed = packed
        self._moving = {
            name
            for name, writers in plan.writers().items()
            if plan.buffers[name].role == "activation"
            and all(self._is_packed(step) and step.outputs["y"] == Access(name) for step in writers)
        }
        self._done = _last_readers(plan, self._moving)
        if plan.storage:
            own = {name: buffer for name, buffer in plan.buffers.items() if name not in self._moving}
            plan = plan.replace(storage=reuse_buffers(plan.replace(buffers=own)).storage)
        super().__init__(plan, weights, constants, torch.device("cpu"), self._moving)

    def _is_packed(self, step: Step) -> bool:
        return step.op == "linear" and (step.weights["weight"], step.options.get("rows")) in self._packed

    def _bind(self, step: Step) -> Callable[[], None]:
        multiplies = self._is_packed(step)
        if not multiplies and not any(access.buffer in self._moving for access, _ in step.accesses):
            return super()._bind(step)
        (out,) = step.outputs.values()
        weights = {role: self.weights[name] for role, name in step.weights.items() if name in self.weights}
        compute, tensors = getattr(self, f"_{step.op}"), self.tensors
        inputs, shape, done = tuple(step.inputs.items()), self.plan.shape(out), self._done.get(step.name, ())

        def run() -> None:
            x = {role: view(tensors[access.buffer], access) for role, access in inputs}
            if not multiplies:
                compute(step, x, weights, view(tensors[out.buffer], out))
            elif out.buffer in self._moving:
                tensors[out.buffer] = self._product(step, x, weights).view(shape)
            else:
                view(tensors[out.buffer], out).copy_(self._product(step, x, weights).view(shape))
            for name in done:
                del tensors[name]

        return run

    def _product(self, step: Step, x: dict[str, Tensor], w: dict[str, Tensor]) -> Tensor:
        """A packed linear, in new memory."""
        rows, h = step.options.get("rows"), x["x"]
        if not h.is_contiguous():
            h = self._scratch("rows", *h.shape).copy_(h)
        bias = w["bias"] if rows is None else w["bias"][slice(*rows)]
        post, algorithm = _POST[step.options.get("activation")]
        packed = self._packed[step.weights["weight"], rows]
        y = torch.ops.mkldnn._linear_pointwise(h, packed, bias, post, [], algorithm)
        if "scale" in w:
            y.mul_(w["scale"])
        return y.add_(x["residual"]) if "residual" in x else y


def _last_readers(plan: Plan, names: set[str]) -> dict[str, list[str]]:
    """Step -> the named buffers that nothing touches after it. What the body leaves to the loop stays."""
    found: dict[str, list[str]] = {}
    last = {access.buffer: step.name for step in plan.all_steps for access, _ in step.accesses}
    in_loop = {step.name for step in plan.loop}
    for name, writers in plan.writers().items():
        if name in names and (last[name] in in_loop) == (writers[0].name in in_loop):
            found.setdefault(last[name], []).append(name)
    return found
