"""8-bit GEMMs of the so400m MLP and projections, in int8 and fp8, and the pass that quantises."""

from __future__ import annotations

import torch

from vat_fast.kernels import low_precision as lp
from vat_fast.kernels.eight_bit import Quantized, quantize_ref
from vat_fast.kernels.gemm import RowStats, Workspace, linear_ref
from vat_fast.kernels.proof.case import Case, Tensors, random, unwritten

EPS = 1e-6
ROW_SCALES = "a group of columns has one fp32 scale per row, read in the loop: 4 bytes beside a step of 64 or 128"
FP8 = torch.float8_e4m3fn
INT8_ARCHS: tuple[int | str, ...] = (80, 87, 89, 90, 100, 110, "gfx942")
FP8_ARCHS: tuple[int | str, ...] = (89, 90, 100, 110)


def _eight_bits(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    if dtype == torch.int8:
        return random(*shape, dtype=dtype, seed=seed)
    return random(*shape, dtype=torch.float32, scale=100.0, seed=seed).clamp(-448, 448).to(dtype)


def unwritten_8bit(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Room for an 8-bit result: NaN in fp8, the smallest value in int8."""
    return unwritten(*shape, dtype=torch.float32).to(dtype) if dtype == FP8 else unwritten(*shape, dtype=dtype)


# What a product in 8 bits is for, and what comes with it.
KINDS = {
    "plain": ("residual",),
    "project": ("norm",),
    "hidden": ("norm", "gelu", "eight"),  # 8 bits alone
    "stream": ("residual", "out", "eight", "stats_out"),
}


def _config(M: int, N: int, K: int, dtype: torch.dtype, group: int, kind: str) -> dict[str, int]:
    return lp.quant_linear_config(M, N, K, dtype, group, eight_out="eight" in KINDS[kind])


def _stats_of(x_MK: torch.Tensor, width: int) -> torch.Tensor:
    """What a GEMM with `width` columns per tile leaves behind x."""
    parts = [(part.mean(1), part.var(1, correction=0) * part.shape[1]) for part in x_MK.float().split(width, 1)]
    return torch.stack([torch.stack(list(plane)) for plane in zip(*parts, strict=True)])


def _make(M: int, N: int, K: int, dtype: torch.dtype, group: int, kind: str) -> Tensors:
    # Scratch, scales and statistics are as large as the current target's configuration asks.
    config, parts = _config(M, N, K, dtype, group, kind), KINDS[kind]
    scratch = Workspace.allocate(Workspace.sizes(M, N, config), "cpu")
    tensors = {
        "partials": unwritten(*scratch.partials.shape, dtype=torch.float32),
        "counters": scratch.counters,
        "x": _eight_bits(M, K, dtype=dtype, seed=1),
        "x_scale": random(-(-K // group), M, dtype=torch.float32, seed=2).abs() / 100 + 1e-3,
        "weight": _eight_bits(N, K, dtype=dtype, seed=3),
        "weight_scale": random(N, dtype=torch.float32, seed=4).abs() / 100 + 1e-3,
        "bias": random(N, dtype=torch.float32, seed=5),
    }
    if "norm" in parts:
        x = Quantized(tensors["x"], tensors["x_scale"], group).dequantize()
        tensors["stats"] = _stats_of(x, min(group, K))
        tensors["row_sum"] = tensors["weight"].float().sum(1) * tensors["weight_scale"]
    if "residual" in parts:
        tensors["residual"] = random(M, N, seed=6)
    tiles = -(-N // config["BLOCK_N"])
    if "stats_out" in parts:
        tensors["stats_out"] = unwritten(2, tiles, M, dtype=torch.float32)
    if "eight" in parts:
        tensors["eight"] = unwritten_8bit(M, N, dtype=dtype)
        tensors["eight_scale"] = unwritten(tiles, M, dtype=torch.float32)
    if "eight" not in parts or "out" in parts:
        tensors["out"] = unwritten(M, N)
    return tensors


def _case(name: str, M: int, N: int, K: int, dtype: torch.dtype, group: int | None = None, kind: str = "plain") -> Case:
    parts = KINDS[kind]

    def operand(t: Tensors) -> Quantized:
        return Quantized(t["x"], t["x_scale"], t["x"].shape[1] if group is None else group)

    def launch(t: Tensors) -> None:
        x, N = operand(t), t["weight"].shape[0]
        rows, columns = x.values.shape
        config = _config(rows, N, columns, dtype, x.group, kind)
        lp.launch_quant_linear(
            x,
            t["weight"],
            t["weight_scale"],
            t.get("out"),
            bias_N=t["bias"],
            activation="gelu" if "gelu" in parts else "none",
            residual_MN=t.get("residual"),
            norm=RowStats(t["stats"], min(x.group, columns)) if "norm" in parts else None,
            row_sum_N=t.get("row_sum"),
            stats_out=RowStats(t["stats_out"], config["BLOCK_N"]) if "stats_out" in parts else None,
            eight_out=Quantized(t["eight"], t["eight_scale"], config["BLOCK_N"]) if "eight" in parts else None,
            workspace=Workspace(t["partials"], t["counters"]),
            config=config,
        )

    def tile(t: Tensors) -> int:
        return next(n for n in (64, 128) if -(-t["eight"].shape[1] // n) == t["eight_scale"].shape[0])

    def result(t: Tensors) -> Tensors:
        values = {name: t[name] for name in ("out", "stats_out") if name in t}
        return values | {"eight": Quantized(t["eight"], t["eight_scale"], tile(t)).dequantize()}

    def reference(t: Tensors) -> Tensors:
        exact = t["bias"].dtype == torch.float64
        wide = torch.float64 if exact else torch.bfloat16
        x = operand(t).dequantize(wide)
        weight = t["weight"].to(wide) * t["weight_scale"].to(wide)[:, None]
        if "norm" in parts:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=EPS)
        y = linear_ref(x, weight, t["bias"].to(wide), "gelu" if "gelu" in parts else "none", t.get("residual"))
        if "eight" not in parts:
            return {"out": y}
        # Eager rounds to 8 bits too; the truth does not.
        eight = y if exact else quantize_ref(y, dtype, tile(t)).dequantize()
        return {"out": y, "eight": eight} if "out" in parts else {"eight": eight}

    edge_k = 304 if group else K % 128 + 256
    names = {
        "out": "eight" not in parts or "out" in parts,
        "eight": "eight" in parts,
        "stats_out": "stats_out" in parts,
    }
    outputs = tuple(name for name, there in names.items() if there)
    return Case(
        op="low_precision",
        name=f"{name} {'int8' if dtype == torch.int8 else 'fp8'} M{M}",
        make=lambda: _make(M, N, K, dtype, group or K, kind),
        edge=lambda: _make(57, 144, edge_k, dtype, group or edge_k, kind),
        launch=launch,
        result=result if "eight" in parts else None,
        reference=reference,
        outputs=(*outputs, "eight_scale") if "eight" in parts else outputs,
        useful_flops=2 * M * N * K,
        useful_bytes=M * K + N * K + M * N * (2 * names["out"] + names["eight"] + 2 * ("residual" in parts)),
        mma=True,
        archs=INT8_ARCHS if dtype == torch.int8 else FP8_ARCHS,
        narrow=ROW_SCALES if group else "",
    )


def _quantise_case(M: int, K: int, dtype: torch.dtype) -> Case:
    def make(M: int) -> Tensors:
        return {
            "x": random(M, K, seed=1),
            "values": unwritten_8bit(M, K, dtype=dtype),
            "scales": unwritten(1, M, dtype=torch.float32),
        }

    def reference(t: Tensors) -> Tensors:
        normed = torch.nn.functional.layer_norm(t["x"], t["x"].shape[1:], eps=EPS)
        exact = t["x"].dtype == torch.float64
        return {"values": normed if exact else quantize_ref(normed, dtype).dequantize()}

    return Case(
        op="low_precision",
        name=f"so400m norm {'int8' if dtype == torch.int8 else 'fp8'} M{M}",
        make=lambda: make(M),
        edge=lambda: make(7),
        launch=lambda t: lp.launch_quantize(t["x"], Quantized(t["values"], t["scales"], t["x"].shape[1]), norm=True),
        result=lambda t: {"values": Quantized(t["values"], t["scales"], t["x"].shape[1]).dequantize()},
        reference=reference,
        outputs=("values", "scales"),
        useful_flops=0,
        useful_bytes=3 * M * K + 4 * M,
        mma=False,
        archs=INT8_ARCHS if dtype == torch.int8 else FP8_ARCHS,
    )


CASES = [
    case
    for dtype in (torch.int8, FP8)
    for case in (
        _case("so400m vision projection 5D", 512, 5760, 1152, dtype, 64, "project"),
        _case("so400m vision fc1", 512, 4304, 1152, dtype, 64, "hidden"),
        _case("so400m vision fc2", 512, 1152, 4304, dtype, 128, "stream"),
        _case("so400m one scale per token", 56, 1152, 1152, dtype),
        _quantise_case(512, 1152, dtype),
    )
]
