"""This machine's floor for a plan: its matrix products at the best rate that any library at hand reaches here.

Who is asked: oneDNN through PyTorch, OpenVINO where it is installed, and in fp32 the operators compiled here; all with
weights packed beforehand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from vat_fast.frozen.costs import gemm_shape, step_cost
from vat_fast.frozen.cpu import has_integers
from vat_fast.frozen.native_executor import pack_weight
from vat_fast.frozen.native_integers import BITS, pack_integers, words
from vat_fast.frozen.plan import Plan
from vat_fast.native import library
from vat_fast.native.calls import Count, Integers, call
from vat_fast.precision import multiplies_bfloat16

SECONDS = 0.15
"""Per shape and library; weights alternate, so that they come from memory as in a forward."""
_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def gemm_gflops(M: int, N: int, K: int, dtype: str) -> float:
    """Measured GFLOP/s of y (M, N) = x (M, K) W (N, K)^T + b with packed weights; `dtype` as for `freeze`."""
    return 2e-9 * M * N * K / min(_seconds(make(M, N, K, dtype)) for make in makers(dtype).values())


def makers(dtype: str) -> dict[str, Callable[[int, int, int, str], Callable[[int], Any]]]:
    """Who has such products here, by name."""
    if dtype in BITS:
        integers = {"the native operators": _native_integers} if has_integers() else {}
        return {"oneDNN": _int8, **integers} if dtype == "int8" else integers
    found = {"oneDNN": _onednn}
    if find_spec("openvino") is not None:
        found["OpenVINO"] = _openvino
    if dtype == "fp32" and library.why_not() is None:
        found["the native operators"] = _native
    return found


def _seconds(call: Callable[[int], Any]) -> float:
    """Median of one call."""
    call(0)
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 5:
        start = time.perf_counter()
        call(len(times) % 2)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _onednn(M: int, N: int, K: int, dtype: str) -> Callable[[int], Any]:
    ops, kind = torch.ops.mkldnn, _TYPES[dtype]
    x, bias = torch.randn(M, K).to(kind), torch.randn(N).to(kind)
    packed = [ops._reorder_linear_weight(torch.randn(N, K).to(kind), M) for _ in range(2)]
    return lambda i: ops._linear_pointwise(x, packed[i], bias, "none", [], "")


def _openvino(M: int, N: int, K: int, dtype: str) -> Callable[[int], Any]:
    import openvino as ov
    import openvino.opset13 as op

    from vat_fast.frozen.openvino_executor import compile_for_cpu

    def product() -> Any:
        x = op.parameter([M, K], ov.Type.f32)
        weight = op.constant(np.random.default_rng(0).standard_normal((N, K), dtype=np.float32))
        # With a bias and something behind it, as in a plan: plain float32 products go to a slower library.
        y = op.relu(op.add(op.matmul(x, weight, False, True), op.constant(np.ones(N, dtype=np.float32))))
        request = compile_for_cpu(ov.Model([y], [x], "product"), dtype)
        request.set_input_tensor(ov.Tensor(np.random.default_rng(1).standard_normal((M, K), dtype=np.float32)))
        return request

    requests = [product() for _ in range(2)]
    return lambda i: requests[i].infer()


def _native(M: int, N: int, K: int, dtype: str) -> Callable[[int], Any]:
    x, bias, y = torch.randn(M, K), torch.randn(N), torch.empty(M, N)
    packed = [pack_weight(torch.randn(N, K)) for _ in range(2)]
    none = Count(0)
    return lambda i: call(
        "vat_step_linear", *(x, K, M, K, -1.0, None, None, 1, bias, N, none, None, 0, y, N, packed[i], None)
    )


def _native_integers(M: int, N: int, K: int, dtype: str) -> Callable[[int], Any]:
    x, bias, y = torch.randn(M, K), torch.randn(N), torch.empty(M, N)
    packed = [pack_integers(torch.randn(N, K), BITS[dtype]) for _ in range(2)]
    room, rows = torch.empty(M, words(K, BITS[dtype]), dtype=torch.int32), torch.empty(M, 2)

    def product(i: int) -> None:
        w = packed[i]
        inputs, outputs = (x, K, M, K, -1.0, None, None, 1), (bias, N, Count(0), None, 0, y, N)
        weight = Count(w.bits), w.even, Integers(w.numbers), w.scale, w.sums
        call("vat_integer_linear", *inputs, *outputs, *weight, Integers(room), rows)

    return product


def _int8(M: int, N: int, K: int, dtype: str) -> Callable[[int], Any]:
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

    Attention's products count at the best rate of any shape in the precision that they are computed in, which in
    integer plans is bf16, or fp32 where the processor does not multiply bf16; norms, softmax and GELU count as nothing.
    """
    rates: dict[str, float] = {}
    wide = "bf16" if dtype not in ("fp32", "int16") and multiplies_bfloat16("cpu") else "fp32"
    best = total = attention = 0.0
    for step in plan.all_steps:
        flops = step_cost(plan, step, "torch").flops
        if step.op == "linear":
            M, N, K = gemm_shape(plan, step)
            key = f"{M}x{N}x{K}"
            # Products of a few rows or columns are no measure of anything.
            narrow = dtype if min(N, K) >= 32 and not step.name.startswith("head") else wide
            if key not in rates:
                rates[key] = gemm_gflops(M, N, K, narrow)
                best = max(best, rates[key] if narrow == wide else gemm_gflops(M, N, K, wide))
            total += flops / rates[key] / 1e6
        else:
            attention += flops
    return total + attention / best / 1e6, rates
