"""Linear layers with 8-bit weights and activations (W8A8): int8 everywhere, fp8 e4m3 from compute capability 8.9.

    y = residual + layer_scale * gelu((q_x * s_x) @ (q_w * s_w)^T + b)

Weights carry one scale per output channel, activations one per token, as in SmoothQuant (Xiao et al., 2023, section 3).
Inside a layer nobody runs a pass just to quantise: a GEMM's epilogue writes 8 bits, one scale per token and column
tile, because no program sees a whole row; the reader then applies the scale of each group of columns inside its loop.
A tensor in 8 bits is a pair: values (M, K) and scales (groups, M) fp32, see ``eight_bit``.

A LayerNorm is folded as in ``gemm``: its affine part into the weight before that is quantised, its mean and deviation
into the accumulator (``fold_layernorm_8bit``). x is then quantised before it is normalised, in groups; a channel of
huge values spoils its own group, not the whole row as it would with one scale per normalised row.

Inference only: no backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from vat_fast.kernels import configs, tables
from vat_fast.kernels.eight_bit import (
    LARGEST,
    Quantized,
    check_scales,
    quantize_ref,
    quantize_rows,
    quantize_weight,
)
from vat_fast.kernels.gemm import (
    Film,
    RowStats,
    Workspace,
    activate_ref,
    check_inputs,
    check_outputs,
    check_split,
    epilogue_constants,
    epilogue_pointers,
    fold_layernorm,
    linear_epilogue,
    merge_row_stats,
    reduce_splits,
    tile_index,
    with_splits,
)

OLDEST_FP8_ARCH = 89


# ---------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------


def quant_linear_ref(
    x: Quantized,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``gemm.linear_ref`` of the dequantised operands, in `dtype`."""
    weight = weight_NK.to(dtype) * weight_scale_N.to(dtype)[:, None]
    y = activate_ref(F.linear(x.dequantize(dtype), weight, None if bias is None else bias.to(dtype)), activation)
    if layer_scale is not None:
        y = y * layer_scale.to(dtype)
    return y if residual is None else residual.to(dtype) + y


def fold_layernorm_8bit(
    weight_NK: Tensor, bias_N: Tensor | None, norm_weight_K: Tensor, norm_bias_K: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``gemm.fold_layernorm`` with the folded weight in 8 bits.

    Returns:
        (values (N, K) in `dtype`, bias (N,) fp32, row_sum (N,) fp32 of the dequantised weight, scales (N,) fp32).
    """
    folded, bias, _ = fold_layernorm(weight_NK, bias_N, norm_weight_K, norm_bias_K, torch.float32)
    values, scales = quantize_weight(folded, dtype)
    return values, bias, (values.double().sum(1) * scales.double()).float(), scales


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def _quant_linear_kernel(
    x_ptr,  # (M, K) 8 bits
    x_scale_ptr,  # (groups, rows) fp32
    w_ptr,  # (N, K) 8 bits
    w_scale_ptr,  # (N,) fp32
    row_sum_ptr,  # (N,) fp32: sums of the folded, dequantised weight's rows; None without a norm
    stats_in_ptr,  # (2, parts, rows) fp32
    bias_ptr,
    scale_ptr,  # LayerScale
    residual_ptr,
    out_ptr,
    film_gamma_ptr,
    film_beta_ptr,
    task_ptr,
    film_out_ptr,
    stats_out_ptr,
    eight_ptr,
    eight_scale_ptr,
    partial_ptr,
    counter_ptr,
    stride_x_scale,
    stride_stats_in_plane,
    stride_stats_in_part,
    stride_stats_out_plane,
    stride_stats_out_part,
    stride_eight_scale,
    M,
    rows_per_sample,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_XM: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_RM: tl.constexpr,
    STRIDE_OM: tl.constexpr,
    STRIDE_FM: tl.constexpr,
    STRIDE_EM: tl.constexpr,
    STRIDE_GAMMA: tl.constexpr,
    STATS_WIDTH: tl.constexpr,
    GROUP_K: tl.constexpr,  # columns per activation scale; K: one scale per token
    ACTIVATION: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    pid_m, pid_n = tile_index(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - pid_m * BLOCK_M)
    col = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - pid_n * BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    begin = split * STEPS // SPLIT_K
    end = (split + 1) * STEPS // SPLIT_K
    x_base = x_ptr + pid_m.to(tl.int64) * (BLOCK_M * STRIDE_XM)
    w_base = w_ptr + pid_n.to(tl.int64) * (BLOCK_N * STRIDE_WN)
    x_at = x_base + row[:, None] * STRIDE_XM + (begin * BLOCK_K + k)[None, :]
    w_at = w_base + col[None, :] * STRIDE_WN + (begin * BLOCK_K + k)[:, None]
    scale_at = x_scale_ptr + pid_m * BLOCK_M + row

    PER_TOKEN: tl.constexpr = GROUP_K >= K
    INT: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INT and PER_TOKEN else tl.float32)
    for step in range(begin, end):
        if K % BLOCK_K == 0:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            left = K - step * BLOCK_K
            x = tl.load(x_at, mask=(k < left)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k < left)[:, None], other=0.0)
        if PER_TOKEN:
            total = tl.dot(x, w, total, out_dtype=tl.int32 if INT else tl.float32)
        else:
            part = tl.dot(x, w, out_dtype=tl.int32 if INT else tl.float32)
            x_scale = tl.load(scale_at + (step * BLOCK_K // GROUP_K) * stride_x_scale)
            total += part.to(tl.float32) * x_scale[:, None]
        x_at += BLOCK_K
        w_at += BLOCK_K
    acc = total.to(tl.float32)

    last = True
    if SPLIT_K > 1:
        acc, last = reduce_splits(acc, partial_ptr, counter_ptr, tile, split, SPLIT_K)
    if last:
        if PER_TOKEN:
            acc *= tl.load(scale_at)[:, None]
        acc *= tl.load(w_scale_ptr + pid_n * BLOCK_N + col)[None, :]
        if stats_in_ptr is not None:
            mean, rstd = merge_row_stats(
                stats_in_ptr, stride_stats_in_plane, stride_stats_in_part, pid_m * BLOCK_M + row, K, STATS_WIDTH, eps
            )
            row_sum = tl.load(row_sum_ptr + pid_n * BLOCK_N + col)
            acc = rstd[:, None] * (acc - mean[:, None] * row_sum[None, :])
        linear_epilogue(
            acc,
            pid_m,
            pid_n,
            bias_ptr,
            scale_ptr,
            residual_ptr,
            out_ptr,
            film_gamma_ptr,
            film_beta_ptr,
            task_ptr,
            film_out_ptr,
            stats_out_ptr,
            eight_ptr,
            eight_scale_ptr,
            stride_stats_out_plane,
            stride_stats_out_part,
            stride_eight_scale,
            M,
            rows_per_sample,
            N,
            STRIDE_RM,
            STRIDE_OM,
            STRIDE_FM,
            STRIDE_EM,
            STRIDE_GAMMA,
            ACTIVATION,
            LARGEST,
            BLOCK_M,
            BLOCK_N,
        )


@triton.jit(do_not_specialize=["M"])
def _quantize_kernel(
    x_ptr,  # (M, K)
    out_ptr,  # (M, K) 8 bits
    scale_ptr,  # (groups, rows) fp32
    stride_scale,
    M,
    eps,
    K: tl.constexpr,
    GROUP: tl.constexpr,  # columns per scale: K with NORM
    STRIDE_XM: tl.constexpr,
    STRIDE_OM: tl.constexpr,
    NORM: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least GROUP
):
    """One group of columns per program. Grid: (row tiles, groups)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    group = tl.program_id(1)
    inside = tl.arange(0, BLOCK_K)
    k = group * GROUP + inside
    rows_64 = rows.to(tl.int64)[:, None]
    here = (inside < GROUP) & (k < K)
    mask = (rows < M)[:, None] & here[None, :]
    x = tl.load(x_ptr + rows_64 * STRIDE_XM + k[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM:
        x -= (tl.sum(x, 1) / K)[:, None]
        x = tl.where(here[None, :], x, 0.0)
        x *= tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
    q, scale = quantize_rows(x, out_ptr.dtype.element_ty, LARGEST)
    tl.store(out_ptr + rows_64 * STRIDE_OM + k[None, :], q, mask=mask)
    tl.store(scale_ptr + group * stride_scale + rows, scale, mask=rows < M)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------


def quant_linear_config(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    group: int,
    arch: configs.Arch | None = None,
    eight_out: bool = False,
) -> dict[str, Any]:
    """The shipped configuration of ``launch_quant_linear``; `group` is the activation's columns per scale.

    eight_out: the launch also writes 8 bits, whose groups are the column tiles: BLOCK_N is the same on every target.

    Raises:
        ValueError: `dtype` is not an 8-bit type, or fp8 on a target without it.
    """
    if arch is None:
        arch = configs.current_arch()
        if knobs.runtime.interpret and dtype == torch.float8_e4m3fn and arch == configs.INTERPRETER_ARCH:
            arch = OLDEST_FP8_ARCH  # the interpreter stands for no target and multiplies any dtype
    check_dtype(dtype, arch)
    table = GROUPED_CONFIGS if eight_out else CONFIGS
    config = configs.pick(table, arch, M=M, N=N, K=K, dtype="int8" if dtype == torch.int8 else "fp8")
    if group < K:
        config["BLOCK_K"] = min(config["BLOCK_K"], group)
    return with_splits(config, K)


def check_dtype(dtype: torch.dtype, arch: configs.Arch) -> None:
    """Reject dtypes that the target's tensor cores do not multiply."""
    if dtype not in LARGEST:
        raise ValueError(f"8-bit linears take torch.int8 or torch.float8_e4m3fn, got {dtype}")
    if dtype == torch.float8_e4m3fn and not (isinstance(arch, int) and arch >= OLDEST_FP8_ARCH):
        raise ValueError(f"float8_e4m3fn needs an NVIDIA GPU of compute capability 8.9 or newer, got {arch}; use int8")


def launch_quantize(x_MK: Tensor, out: Quantized, *, norm: bool, eps: float = 1e-6) -> None:
    """One launch: x, or its LayerNorm without affine part, to 8 bits with one scale per token and group of columns.

    Args:
        x_MK: (M, K) fp16, bf16 or fp32, last stride 1.
        out: values (M, K) with last stride 1, scales (groups, >= M); written.
        norm: whether to normalise first, which needs the whole row in one group; eps is the norm's.
    """
    M, K = x_MK.shape
    if out.values.shape != (M, K) or x_MK.stride(1) != 1 or out.values.stride(1) != 1:
        raise ValueError(
            f"quantising x {tuple(x_MK.shape)} needs values of that shape, last strides 1, "
            f"got {tuple(out.values.shape)}, strides {x_MK.stride()} and {out.values.stride()}"
        )
    if norm and out.group < K:
        raise ValueError(f"a norm needs all {K} columns in one group, got groups of {out.group}")
    check_scales(out)
    group = min(out.group, K)
    block_k = triton.next_power_of_2(group)
    block_m = max(1, 4096 // block_k)
    _quantize_kernel[(triton.cdiv(M, block_m), triton.cdiv(K, group))](
        x_MK,
        out.values,
        out.scales,
        out.scales.stride(0),
        M,
        eps,
        K=K,
        GROUP=group,
        STRIDE_XM=x_MK.stride(0),
        STRIDE_OM=out.values.stride(0),
        NORM=norm,
        LARGEST=LARGEST[out.values.dtype],
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=4,
    )


def launch_quant_linear(
    x: Quantized,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    out_MN: Tensor | None,
    *,
    bias_N: Tensor | None = None,
    activation: str = "none",
    residual_MN: Tensor | None = None,
    layer_scale_N: Tensor | None = None,
    norm: RowStats | None = None,
    row_sum_N: Tensor | None = None,
    eps: float = 1e-6,
    film: Film | None = None,
    stats_out: RowStats | None = None,
    eight_out: Quantized | None = None,
    workspace: Workspace | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """One launch of the 8-bit GEMM; optional parts as in ``gemm.launch_linear``.

    Args:
        x: (M, K) in 8 bits. weight_NK, weight_scale_N: from ``quantize_weight``, same dtype as x.
        out_MN: (M, N) floats, last stride 1; written. None: only FiLM or 8 bits of it are wanted.
        norm, row_sum_N: of ``fold_layernorm_8bit``; the statistics are of x before it was quantised.

    Raises:
        ValueError: shapes, dtypes, groups or options that do not fit together.
    """
    M, K = x.values.shape
    N = weight_NK.shape[0]
    if config is None:
        config = quant_linear_config(M, N, K, x.values.dtype, x.group, eight_out=eight_out is not None)
    _check_quant_linear(x, weight_NK, weight_scale_N, config)
    check_inputs(M, N, K, bias_N, activation, residual_MN, layer_scale_N, norm, row_sum_N)
    check_outputs(M, N, out_MN, film, stats_out, eight_out, config["BLOCK_N"])
    split_k = check_split(M, N, K, workspace, config)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    _quant_linear_kernel[(tiles, split_k)](
        x.values,
        x.scales,
        weight_NK,
        weight_scale_N,
        row_sum_N,
        norm.values if norm else None,
        bias_N,
        layer_scale_N,
        residual_MN,
        out_MN,
        *epilogue_pointers(film, stats_out, eight_out),
        workspace.partials if workspace and split_k > 1 else None,
        workspace.counters if workspace and split_k > 1 else None,
        x.scales.stride(0),
        *(norm.values.stride()[:2] if norm else (0, 0)),
        *(stats_out.values.stride()[:2] if stats_out else (0, 0)),
        eight_out.scales.stride(0) if eight_out else 0,
        M,
        film.rows_per_sample if film else 1,
        eps,
        N=N,
        K=K,
        STRIDE_XM=x.values.stride(0),
        STRIDE_WN=weight_NK.stride(0),
        STATS_WIDTH=norm.width if norm else 0,
        GROUP_K=x.group,
        ACTIVATION=activation,
        **epilogue_constants(residual_MN, out_MN, film, eight_out),
        **config,
    )


def _check_quant_linear(x: Quantized, weight: Tensor, weight_scale: Tensor, config: dict[str, Any]) -> None:
    (M, K), N = x.values.shape, weight.shape[0]
    dtype = x.values.dtype
    if weight.shape != (N, K) or weight.dtype != dtype or weight.stride(1) != 1 or x.values.stride(1) != 1:
        raise ValueError(
            f"x {(M, K)} {dtype} needs a weight (N, {K}) of the same dtype, both with last stride 1, "
            f"got {tuple(weight.shape)} {weight.dtype}"
        )
    if weight_scale.shape != (N,) or weight_scale.dtype != torch.float32 or not weight_scale.is_contiguous():
        raise ValueError(f"weight scales must be contiguous fp32 ({N},), got {weight_scale.dtype} {weight_scale.shape}")
    check_scales(x)
    if x.group < K and x.group % config["BLOCK_K"]:
        raise ValueError(
            f"activation groups of {x.group} columns need a BLOCK_K that divides them: {config['BLOCK_K']}"
        )


# ---------------------------------------------------------------------------------------------------------------
# Custom op
# ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("vat_fast::quant_linear", mutates_args=(), device_types="cuda")
def quant_linear(
    x: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias: Tensor | None = None,
    norm: bool = False,
    eps: float = 1e-6,
    activation: str = "none",
) -> Tensor:
    """act(norm(x) @ weight^T + bias) in the weight's 8-bit dtype: a quantising (norm) pass and a GEMM.

    Args:
        x: (..., K) floats. weight_NK, weight_scale_N: from ``quantize_weight``. bias: (N,).
        norm: LayerNorm x first; its affine part is folded into the weight and bias.

    Returns:
        (..., N) in x's dtype. Inference only.
    """
    x_MK = x.reshape(-1, x.shape[-1]).contiguous()
    (M, K), N = x_MK.shape, weight_NK.shape[0]
    quantized = Quantized.empty(M, K, K, weight_NK.dtype, x.device)
    out = x.new_empty(*x.shape[:-1], N)
    with torch.cuda.device_of(x):
        launch_quantize(x_MK, quantized, norm=norm, eps=eps)
        config = quant_linear_config(M, N, K, weight_NK.dtype, K)
        launch_quant_linear(
            quantized,
            weight_NK,
            weight_scale_N,
            out.view(M, N),
            bias_N=bias,
            activation=activation,
            workspace=Workspace.allocate(Workspace.sizes(M, N, config), x.device),
            config=config,
        )
    return out


@quant_linear.register_kernel("cpu")
def _(
    x: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias: Tensor | None = None,
    norm: bool = False,
    eps: float = 1e-6,
    activation: str = "none",
) -> Tensor:
    x_MK = x.reshape(-1, x.shape[-1]).float()
    if norm:
        x_MK = F.layer_norm(x_MK, x_MK.shape[-1:], eps=eps)
    quantized = quantize_ref(x_MK, weight_NK.dtype)
    y = quant_linear_ref(quantized, weight_NK, weight_scale_N, bias, activation)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


@quant_linear.register_fake
def _(
    x: Tensor,
    weight_NK: Tensor,
    weight_scale_N: Tensor,
    bias: Tensor | None = None,
    norm: bool = False,
    eps: float = 1e-6,
    activation: str = "none",
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_NK.shape[0])


# ---------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------


CONFIGS: configs.ConfigTable = {arch: configs.rules(rows) for arch, rows in tables.QUANT_LINEAR.items()}
GROUPED_CONFIGS: configs.ConfigTable = {arch: configs.rules(rows) for arch, rows in tables.GROUPED_QUANT_LINEAR.items()}
