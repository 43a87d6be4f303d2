"""What a step costs: operations, bytes and launches, counted from the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from vat_fast.frozen.plan import BYTES, Access, Plan, Step


@dataclass(frozen=True)
class StepCost:
    """flops: two per multiply-add, of matrix products only, without padding. Bytes as if nothing were cached.

    weight_bytes counts each weight once; of a table, the rows that one run reads. launches: kernels on a GPU.
    """

    flops: int
    weight_bytes: int
    read_bytes: int
    write_bytes: int
    launches: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.weight_bytes + self.read_bytes + self.write_bytes


def step_cost(plan: Plan, step: Step, executor: str) -> StepCost:
    """The cost of one run of `step`."""

    def size(access: Access) -> int:
        return prod(plan.shape(access)) * BYTES[plan.buffers[access.buffer].dtype]

    return StepCost(
        flops=_flops(plan, step),
        weight_bytes=sum(weight_bytes(plan, step, role) for role in step.weights),
        read_bytes=sum({(a.buffer, a.tokens, a.columns): size(a) for a in step.inputs.values()}.values()),
        write_bytes=sum(size(access) for access in step.outputs.values()),
        launches=triton_launches(step) if executor == "triton" else eager_launches(step),
    )


def gemm_shape(plan: Plan, step: Step) -> tuple[int, int, int]:
    """(M, N, K) of a linear or patch embedding: y (M, N) = x (M, K) W (N, K)^T."""
    shape = plan.shape(next(step.outputs[role] for role in ("y", "film", "eight") if role in step.outputs))
    weight = plan.weights[step.weights["weight"]].shape
    if step.op == "patch_embed":
        patches = shape[0] * (shape[1] - step.options["views"] * step.options["prefix"])
        return patches, shape[2], prod(weight[1:])
    return prod(shape[:-1]), shape[-1], weight[1]


def attention_shape(plan: Plan, step: Step) -> tuple[int, int, int, int]:
    """(independent rows of queries, queries each, keys, width) of an attention step."""
    if step.op == "attention":
        B, tokens, width = plan.shape(step.inputs["qkv"])
        each = tokens // step.options["views"]
        return B * step.options["views"], each, each, width // 3
    B, queries, width = plan.shape(step.inputs["q"])
    extra = plan.shape(step.inputs["kv_extra"])[1] if "kv_extra" in step.inputs else 0
    return B, queries, extra + plan.shape(step.inputs["kv"])[1], width


def _flops(plan: Plan, step: Step) -> int:
    if step.op in ("linear", "patch_embed"):
        M, N, K = gemm_shape(plan, step)
        rows, column = step.option("last", (0, N))
        return 2 * K * (M * column + plan.batch * rows * (N - column))
    if step.op in ("attention", "cross_attention"):
        return 4 * prod(attention_shape(plan, step))
    return 0


def weight_bytes(plan: Plan, step: Step, role: str) -> int:
    weight = plan.weights[step.weights[role]]
    element = BYTES[plan.dtype] if weight.kind != "vector" or plan.dtype == "fp32" else 4
    if role == "weight" and "quantised" in step.options:
        return weight.elements * BYTES[step.options["quantised"]] + 4 * weight.shape[0]
    if weight.kind == "table":
        return plan.batch * prod(weight.shape[1:]) * element
    if "rows" in step.options and role in ("weight", "bias"):
        begin, end = step.options["rows"]
        return weight.elements // weight.shape[0] * (end - begin) * element
    return weight.elements * element


def in_triton(op: str, options: Mapping[str, Any]) -> bool:
    """Whether the project's kernels cover a step; what they do not runs as PyTorch operators."""
    if op == "patch_embed":
        return "mean" in options
    if op == "linear":
        return options.get("activation") in (None, "gelu", "gelu_tanh", "relu")
    return op in ("norm", "attention", "cross_attention", "quantise")


def triton_launches(step: Step) -> int:
    """Kernel launches with the project's kernels."""
    return 1 if in_triton(step.op, step.options) else eager_launches(step)


def eager_launches(step: Step) -> int:
    """Kernel launches as separate PyTorch operators."""
    if step.op == "patch_embed":
        return 2 + (step.options["prefix"] > 0) + ("mean" in step.options)
    if step.op == "linear":
        parts = (
            "activation" in step.options,
            "norm" in step.options,
            "scale" in step.weights,
            "residual" in step.inputs,
        )
        return 1 + sum(parts) + ("film" in step.outputs) * 2
    if step.op == "residual":
        return 1 + ("scale" in step.weights)
    if step.op == "norm":
        return 1 + 2 * ("x" in step.inputs and ("task_id" in step.inputs or "gamma_beta" in step.inputs))
    if step.op == "film":
        return 2
    if step.op == "cross_attention":
        return 1 + ("kv_extra" in step.inputs)
    if step.op == "ddim":
        return 5
    return 1
