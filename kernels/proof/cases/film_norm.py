"""FiLM + LayerNorm of the action tokens: rollout (one sample) and training (a batch, table by task id)."""

from __future__ import annotations

import torch

from vat_fast.kernels import film_norm
from vat_fast.kernels.proof.case import Case, Tensors, random, unwritten

EPS = 1e-6
TASKS = 30


def _make(B: int, N: int, D: int, dtype: torch.dtype, backward: bool = False, tasks: int = TASKS) -> Tensors:
    tensors = {
        "x": random(B, N, D, dtype=dtype, seed=1),
        "gamma": random(tasks, D, dtype=dtype, scale=0.5, seed=2),
        "beta": random(tasks, D, dtype=dtype, scale=0.5, seed=3),
        "weight": random(D, dtype=dtype, scale=0.3, shift=1.0, seed=4),
        "bias": random(D, dtype=dtype, scale=0.3, seed=5),
        "task_id": torch.arange(B) % tasks,
        "out": unwritten(B, N, D, dtype=dtype),
        "mean": unwritten(B, N, dtype=torch.float32),
        "rstd": unwritten(B, N, dtype=torch.float32),
    }
    if backward:
        tensors |= {
            "grad": random(B, N, D, dtype=dtype, seed=6),
            "dx": unwritten(B, N, D, dtype=dtype),
            "dgamma": unwritten(tasks, D, dtype=dtype),
            "dbeta": unwritten(tasks, D, dtype=dtype),
            "dweight": unwritten(D, dtype=dtype),
            "dbias": unwritten(D, dtype=dtype),
        }
    return tensors


_INPUTS = ("x", "gamma", "beta", "weight", "bias")


def _launch(t: Tensors) -> None:
    film_norm.launch_film_layernorm(
        t["x"], t["gamma"], t["beta"], t["weight"], t["bias"], EPS, t["task_id"], t["out"], t["mean"], t["rstd"]
    )


def _launch_both(t: Tensors) -> None:
    _launch(t)
    film_norm.launch_film_layernorm_backward(
        t["grad"], t["x"], t["gamma"], t["beta"], t["weight"], t["mean"], t["rstd"], t["task_id"],
        t["dx"], t["dgamma"], t["dbeta"], t["dweight"], t["dbias"],
    )  # fmt: skip


def _reference(t: Tensors) -> Tensors:
    x, gamma, beta, weight, bias = (t[name] for name in _INPUTS)
    return {"out": film_norm.film_layernorm_ref(x, gamma, beta, weight, bias, EPS, t["task_id"])}


def _reference_both(t: Tensors) -> Tensors:
    leaves = x, gamma, beta, weight, bias = [t[name].detach().requires_grad_() for name in _INPUTS]
    out = film_norm.film_layernorm_ref(x, gamma, beta, weight, bias, EPS, t["task_id"])
    gradients = torch.autograd.grad(out, leaves, t["grad"])
    names = ("dx", "dgamma", "dbeta", "dweight", "dbias")
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def _case(name: str, B: int, N: int, D: int, backward: bool = False) -> Case:
    token_bytes = 2 * B * N * D
    film_bytes = 2 * 2 * min(B, TASKS) * D + 2 * 2 * D
    outputs: tuple[str, ...] = ("out", "mean", "rstd")
    if backward:
        outputs += ("dx", "dgamma", "dbeta", "dweight", "dbias")
    # Forward: x in, y out. Backward: x and dy in, dx out; the table's gradient is written whole.
    moved = 5 * token_bytes + 2 * film_bytes + 2 * 2 * TASKS * D if backward else 2 * token_bytes + film_bytes
    return Case(
        op="film_layernorm",
        name=name,
        narrow_amd="a row over all lanes of a block of 64-wide waves leaves each 4 columns or fewer"
        if backward
        else "",
        make=lambda: _make(B, N, D, torch.bfloat16, backward),
        edge=lambda: _make(2, 7, D, torch.bfloat16, backward, tasks=3),
        launch=_launch_both if backward else _launch,
        reference=_reference_both if backward else _reference,
        outputs=outputs,
        useful_flops=0,
        useful_bytes=moved,
        mma=False,
    )


CASES = [
    _case("so400m B1", 1, 56, 1152),
    _case("so400m B16", 16, 56, 1152),
    _case("giantopt B1", 1, 56, 1536),
    _case("dinov2 B1", 1, 56, 1024),
    _case("so400m B16 forward+backward", 16, 56, 1152, backward=True),
]
