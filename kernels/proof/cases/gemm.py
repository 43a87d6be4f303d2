"""GEMMs of both streams: rollout at batch 1 with two views, a batch of 16, and the other presets."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vat_fast.kernels import gemm
from vat_fast.kernels.eight_bit import Quantized
from vat_fast.kernels.gemm import Film, RowStats, Workspace
from vat_fast.kernels.proof.case import Case, Tensors, random, unwritten

BF16 = torch.bfloat16
EPS = 1e-6


def _rows_of_film(t: Tensors) -> int:
    return t["x"].shape[0] // t["task_id"].shape[0]


def _launch(t: Tensors) -> None:
    (M, K), N = t["x"].shape, t["weight"].shape[0]
    config = gemm.linear_config(M, N, K, t["x"].dtype, eight_out="eight" in t)
    film = None
    if "film_out" in t:
        film = Film(t["gamma"], t["beta"], t["film_out"], _rows_of_film(t), t["task_id"])
    stats_out = None
    if "stats_out" in t:
        stats_out = RowStats(t["stats_out"], config["BLOCK_N"])
    gemm.launch_linear(
        t["x"],
        t["weight"],
        t["out"],
        bias_N=t["bias"],
        activation=next((name for name in ("gelu", "gelu_tanh", "relu") if name in t), "none"),
        residual_MN=t.get("residual"),
        layer_scale_N=t.get("layer_scale"),
        norm=RowStats(t["stats"], STATS_WIDTH) if "stats" in t else None,
        row_sum_N=t.get("row_sum"),
        eps=EPS,
        film=film,
        stats_out=stats_out,
        eight_out=Quantized(t["eight"], t["eight_scale"], config["BLOCK_N"]) if "eight" in t else None,
        workspace=Workspace(t["partials"], t["counters"]),
        config=config,
    )


# Parts that the statistics of x come in: the column tiles of the GEMM that wrote it.
STATS_WIDTH = 64


def _reference(t: Tensors) -> Tensors:
    x = t["x"]
    if "stats" in t:
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
    activation = next((name for name in ("gelu", "gelu_tanh", "relu") if name in t), "none")
    out = gemm.linear_ref(x, t["weight"], t["bias"].to(x.dtype), activation, t.get("residual"), t.get("layer_scale"))
    results = {"out": out}
    if "film_out" in t:
        rows = t["task_id"].long().repeat_interleave(_rows_of_film(t))
        results["film_out"] = out * (1 + t["gamma"][rows].to(x.dtype)) + t["beta"][rows].to(x.dtype)
    return results


def _stats_of(x_MK: Tensor) -> Tensor:
    """What a GEMM with STATS_WIDTH columns per tile leaves behind x."""
    parts = [(part.mean(1), part.var(1, correction=0) * part.shape[1]) for part in x_MK.float().split(STATS_WIDTH, 1)]
    return torch.stack([torch.stack(list(plane)) for plane in zip(*parts, strict=True)])


def _make(M: int, N: int, K: int, parts: tuple[str, ...], samples: int) -> Tensors:
    # Scratch and statistics are as large as the current target's configuration asks.
    config = gemm.linear_config(M, N, K, BF16, eight_out="eight" in parts)
    scratch = Workspace.allocate(Workspace.sizes(M, N, config), "cpu")
    tensors = {
        "partials": unwritten(*scratch.partials.shape, dtype=torch.float32),
        "counters": scratch.counters,
        "x": random(M, K, seed=1, shift=0.2),
        "weight": random(N, K, scale=K**-0.5, seed=2),
        "bias": random(N, dtype=torch.float32, seed=3),
        "out": unwritten(M, N),
    }
    if "norm" in parts:
        tensors["stats"] = _stats_of(tensors["x"])
        tensors["row_sum"] = tensors["weight"].double().sum(1).float()
    for name in ("gelu", "gelu_tanh", "relu"):
        if name in parts:
            tensors[name] = torch.ones(1)  # a mark, read by neither kernel nor reference
    if "residual" in parts:
        tensors["residual"] = random(M, N, seed=4)
        tensors["stats_out"] = unwritten(2, gemm.stats_parts(N, config["BLOCK_N"]), M, dtype=torch.float32)
    if "eight" in parts:
        tensors["eight"] = unwritten(M, N, dtype=torch.int8)
        tensors["eight_scale"] = unwritten(gemm.stats_parts(N, config["BLOCK_N"]), M, dtype=torch.float32)
    if "scale" in parts:
        tensors["layer_scale"] = random(N, seed=5)
    if "film" in parts:
        tensors["gamma"] = random(30, N, scale=0.5, seed=6)
        tensors["beta"] = random(30, N, scale=0.5, seed=7)
        tensors["task_id"] = torch.arange(samples, dtype=torch.int32)
        tensors["film_out"] = unwritten(M, N)
    return tensors


def _case(name: str, M: int, N: int, K: int, *parts: str, samples: int = 1) -> Case:
    outputs = ("out", *(["film_out"] if "film" in parts else []), *(["stats_out"] if "residual" in parts else []))
    outputs += ("eight", "eight_scale") if "eight" in parts else ()
    in_and_out = M * K + N * K + M * N * (1 + ("residual" in parts) + ("film" in parts))
    return Case(
        op="gemm",
        name=name,
        make=lambda: _make(M, N, K, parts, samples),
        # Ragged in rows and columns and, like 4304, in K's last step.
        edge=lambda: _make(7 if M <= 8 else 57 if M <= 64 else 70, 144, K % 128 + 256, parts, 1),
        launch=_launch,
        reference=_reference,
        outputs=outputs,
        useful_flops=2 * M * N * K,
        useful_bytes=2 * in_and_out + M * N * ("eight" in parts),
        mma=True,
        # The head: one row for each of a chunk's 8 steps.
        extra_flops_amd="its MMAs multiply at least 16 rows and columns; weight traffic bounds so few"
        if M < 16
        else "",
        most_issued_amd=2.0 if M < 16 else 0.0,
    )


def _stats_case(name: str, M: int, K: int) -> Case:
    def make(M: int) -> Callable[[], Tensors]:
        return lambda: {"x": random(M, K, seed=1), "stats": unwritten(2, 1, M, dtype=torch.float32)}

    def reference(t: Tensors) -> Tensors:
        mean = t["x"].mean(1)
        return {"stats": torch.stack([mean, ((t["x"] - mean[:, None]) ** 2).sum(1)])[:, None]}

    return Case(
        op="gemm",
        name=name,
        make=make(M),
        edge=make(7),
        launch=lambda t: gemm.launch_row_stats(t["x"], RowStats(t["stats"], t["x"].shape[1])),
        reference=reference,
        outputs=("stats",),
        useful_flops=0,
        useful_bytes=2 * M * K + 8 * M,
        mma=False,
    )


CASES = [
    _case("so400m vision projection 5D M512", 512, 5760, 1152, "norm"),
    _case("so400m vision output M512", 512, 1152, 1152, "residual"),
    _case("so400m vision fc1 M512", 512, 4304, 1152, "norm", "gelu"),
    _case("so400m vision fc2 M512", 512, 1152, 4304, "residual"),
    _case("so400m action query M56", 56, 1152, 1152, "norm"),
    _case("so400m action output M56", 56, 1152, 1152, "residual"),
    _case("so400m action fc1 M56", 56, 4304, 1152, "norm", "gelu"),
    _case("so400m action fc2 FiLM M56", 56, 1152, 4304, "residual", "film"),
    _case("so400m vision fc1 M8192", 8192, 4304, 1152, "norm", "gelu"),
    _case("so400m vision fc2 M8192", 8192, 1152, 4304, "residual"),
    _case("so400m action fc2 FiLM M896", 896, 1152, 4304, "residual", "film", samples=16),
    _case("dinov2 vision fc2 M522", 522, 1024, 4096, "residual", "scale"),
    _case("giantopt vision fc1 M512", 512, 6144, 1536, "norm", "gelu_tanh"),
    _case("so400m head first M8", 8, 1152, 8064, "relu"),
    _case("so400m head block M8", 8, 1152, 1152, "norm", "relu", "residual"),
    _case("so400m vision output and its 8 bits M512", 512, 1152, 1152, "residual", "eight"),
    _stats_case("so400m statistics M512", 512, 1152),
]
