"""This machine's floor for a plan: its matrix products at the rate that prepacked oneDNN products reach here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from vat_fast.frozen.costs import gemm_shape, step_cost
from vat_fast.frozen.plan import Plan

SECONDS = 0.15
"""Per shape; weights alternate, so that they come from memory as in a forward."""


def gemm_gflops(M: int, N: int, K: int, dtype: str) -> float:
    """Measured GFLOP/s of y (M, N) = x (M, K) W (N, K)^T + b with packed weights; dtype "fp32", "bf16" or "int8"."""
    call = (
        _quantised(M, N, K)
        if dtype == "int8"
        else _packed(M, N, K, torch.float32 if dtype == "fp32" else torch.bfloat16)
    )
    call(0)
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 5:
        start = time.perf_counter()
        call(len(times) % 2)
        times.append(time.perf_counter() - start)
    return 2e-9 * M * N * K / statistics.median(times)


def _packed(M: int, N: int, K: int, dtype: torch.dtype) -> Callable[[int], Any]:
    ops = torch.ops.mkldnn
    x, bias = torch.randn(M, K).to(dtype), torch.randn(N).to(dtype)
    packed = [ops._reorder_linear_weight(torch.randn(N, K).to(dtype), M) for _ in range(2)]
    return lambda i: ops._linear_pointwise(x, packed[i], bias, "none", [], "")


def _quantised(M: int, N: int, K: int) -> Callable[[int], Any]:
    ops = torch.ops.onednn
    x = torch.randint(0, 255, (M, K), dtype=torch.uint8)
    packed = [ops.qlinear_prepack(torch.randint(-127, 127, (N, K), dtype=torch.int8), [M, K]) for _ in range(2)]
    scale, zero, bias = torch.rand(N) * 0.01, torch.zeros(N, dtype=torch.int64), torch.randn(N)

    def call(i: int) -> Any:
        return ops.qlinear_pointwise(x, 0.02, 128, packed[i], scale, zero, bias, 1.0, 0, torch.float32, "none", [], "")

    return call


@torch.inference_mode()
def floor_ms(plan: Plan, dtype: str) -> tuple[float, dict[str, float]]:
    """(milliseconds of all products of a plan at their measured rates, GFLOP/s by shape).

    Attention's products count at the best rate of any shape; norms, softmax and GELU count as nothing.
    """
    rates: dict[str, float] = {}
    total = attention = 0.0
    for step in plan.all_steps:
        flops = step_cost(plan, step, "torch").flops
        if step.op == "linear":
            M, N, K = gemm_shape(plan, step)
            key = f"{M}x{N}x{K}"
            # Products of a few rows or columns are no measure of anything.
            narrow = (
                dtype if min(N, K) >= 32 and not step.name.startswith("head") else "fp32" if dtype == "fp32" else "bf16"
            )
            if key not in rates:
                rates[key] = gemm_gflops(M, N, K, narrow)
            total += flops / rates[key] / 1e6
        else:
            attention += flops
    return total + attention / max(rates.values()) / 1e6, rates
