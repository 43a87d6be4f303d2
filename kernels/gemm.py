"""Linear layers for inference: one GEMM whose start and end absorb the norm, bias, GELU, residual and FiLM.

    y = residual + layer_scale * gelu(norm(x) @ W^T + b)          every part but the product is optional

The norm is folded. With W' = W diag(w), b' = b + W @ c for a LayerNorm of weight w and bias c,

    LN(x) @ W^T + b  =  rstd * (x @ W'^T - mean * rowsum(W')) + b'

so the hot loop is a plain product and the row statistics are applied to the accumulator. They come from a pass
over x (``launch_row_stats``) or from the epilogue of the GEMM that wrote x: each tile leaves the mean and the sum of
squared deviations of its own columns, and the reader merges them by the parallel rule of Chan, Golub and LeVeque
(1979, "Updating formulae and a pairwise algorithm for computing sample variances").

Few rows leave most of a GPU idle, so K can be split over programs. Each writes its fp32 partial tile; the one that
arrives last, told by a counter, adds the partials in split order. The result does not depend on who was last.

Inference only: no backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vat_fast.kernels import configs, tables
from vat_fast.kernels.eight_bit import LARGEST, Quantized, check_scales, quantize_rows

# "gelu" is exact (by erf); "gelu_tanh" the approximation that some timm backbones were trained with.
# "relu" is the head's.
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu")
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


# ---------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------


def linear_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """residual + layer_scale * act(x @ weight^T + bias), any float dtype, one torch op at a time.

    Args:
        x: (..., K).
        weight: (N, K).
        bias, layer_scale: (N,).
        activation: one of ``ACTIVATIONS``.
        residual: (..., N).

    Returns:
        (..., N) in x's dtype.
    """
    y = activate_ref(F.linear(x, weight, bias), activation)
    if layer_scale is not None:
        y = y * layer_scale
    if residual is not None:
        y = residual + y
    return y


def activate_ref(y: Tensor, activation: str) -> Tensor:
    """One of ``ACTIVATIONS`` by torch."""
    if activation == "none":
        return y
    if activation == "relu":
        return F.relu(y)
    return F.gelu(y, approximate="none" if activation == "gelu" else "tanh")


def norm_linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    """act(LayerNorm(x) @ weight^T + bias) with the norm's weight and bias already folded; shapes as ``linear_ref``."""
    return linear_ref(F.layer_norm(x, x.shape[-1:], eps=eps), weight, bias, activation)


def fold_layernorm(
    weight_NK: Tensor, bias_N: Tensor | None, norm_weight_K: Tensor, norm_bias_K: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold a LayerNorm's affine part into the linear that follows it.

    Returns:
        (weight (N, K) in `dtype`, bias (N,) fp32, row_sum (N,) fp32). The sums are those of the rounded weight: they
        must cancel the row mean exactly as the tensor cores see it.
    """
    wide = weight_NK.double()
    weight = (wide * norm_weight_K.double()).to(dtype)
    bias = wide @ norm_bias_K.double()
    if bias_N is not None:
        bias = bias + bias_N.double()
    return weight, bias.float(), weight.double().sum(1).float()


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------

MMA_ROWS = tl.constexpr(16)


@triton.jit
def tile_index(pid, M, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Program number to tile, GROUP_M rows of tiles at a time so that neighbours share weights in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    in_group = GROUP_M * tiles_n
    first_m = pid // in_group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + pid % in_group % group_m, pid % in_group // group_m


@triton.jit
def gelu(v):
    """Exact GELU in fp32."""
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def gelu_tanh(v):
    """GELU by tanh in fp32: 0.5 * (1 + tanh(u)) is the logistic function of 2u."""
    u2 = 1.5957691216057308 * (v + 0.044715 * v * v * v)
    return v / (1.0 + tl.exp(-u2))


@triton.jit
def merge_row_stats(stats_ptr, stride_plane, stride_part, rows, K: tl.constexpr, WIDTH: tl.constexpr, eps):
    """(mean, rstd) of rows of K columns from per-part means and squared deviations, parts of WIDTH columns."""
    PARTS: tl.constexpr = (K + WIDTH - 1) // WIDTH
    part = tl.arange(0, triton.next_power_of_2(PARTS))
    there = (part < PARTS)[:, None]
    at = stats_ptr + part[:, None] * stride_part + rows[None, :]
    part_mean = tl.load(at, mask=there, other=0.0)
    part_m2 = tl.load(at + stride_plane, mask=there, other=0.0)
    count = tl.where(part < PARTS, tl.minimum(K - part * WIDTH, WIDTH), 0).to(tl.float32)[:, None]
    mean = tl.sum(count * part_mean, 0) / K
    away = part_mean - mean[None, :]
    m2 = tl.sum(part_m2 + count * away * away, 0)
    return mean, tl.rsqrt(m2 / K + eps)


@triton.jit
def store_row_stats(
    stats_ptr, stride_plane, stride_part, part, rows, row_mask, v, cols, N: tl.constexpr, WIDTH: tl.constexpr
):
    """Leave the mean and squared deviation of this tile's columns of each row for ``merge_row_stats``."""
    here = (cols < N)[None, :]
    count = tl.minimum(N - part * WIDTH, WIDTH).to(tl.float32)
    mean = tl.sum(tl.where(here, v, 0.0), 1) / count
    away = tl.where(here, v - mean[:, None], 0.0)
    at = stats_ptr + part * stride_part + rows
    tl.store(at, mean, mask=row_mask)
    tl.store(at + stride_plane, tl.sum(away * away, 1), mask=row_mask)


@triton.jit
def reduce_splits(acc, partial_ptr, counter_ptr, tile, split, SPLIT_K: tl.constexpr):
    """Add the K splits of one tile. Returns (sum, whether this program arrived last and holds it)."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_N: tl.constexpr = acc.shape[1]
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tile_base = partial_ptr + tile.to(tl.int64) * (SPLIT_K * BLOCK_M * BLOCK_N)
    tl.store(tile_base + split * (BLOCK_M * BLOCK_N) + inside, acc)
    # Every thread's partial must be written before one thread announces them.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel")
    last = arrived == SPLIT_K - 1
    if last:
        # .cg: partials of other programs are in L2, never in this SM's L1.
        acc = tl.load(tile_base + inside, cache_modifier=".cg")
        for other in range(1, SPLIT_K):
            acc += tl.load(tile_base + other * (BLOCK_M * BLOCK_N) + inside, cache_modifier=".cg")
        tl.store(counter_ptr + tile, 0)  # ready for the next launch
    return acc, last


@triton.jit
def linear_epilogue(
    v,  # (BLOCK_M, BLOCK_N) fp32: the product, norm applied
    pid_m,
    pid_n,
    bias_ptr,  # (N,)
    scale_ptr,  # (N,) LayerScale
    residual_ptr,  # (M, N)
    out_ptr,  # (M, N) or None
    film_gamma_ptr,  # (samples or tasks, N)
    film_beta_ptr,
    task_ptr,  # (samples,) or None
    film_out_ptr,  # (M, N) or None: out * (1 + gamma) + beta
    stats_ptr,  # (2, parts, rows)
    eight_ptr,  # (M, N) 8 bits or None: the result, after FiLM if there is one
    eight_scale_ptr,  # (tiles of N, rows) fp32
    stride_stats_plane,
    stride_stats_part,
    stride_eight_scale,
    M,
    rows_per_sample,
    N: tl.constexpr,
    STRIDE_RM: tl.constexpr,
    STRIDE_OM: tl.constexpr,
    STRIDE_FM: tl.constexpr,
    STRIDE_EM: tl.constexpr,
    STRIDE_GAMMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LARGEST: tl.constexpr,  # of the 8-bit type
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Bias, GELU, LayerScale, residual, store; then FiLM of the result, its 8 bits and its row statistics for the next
    norm."""
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_64 = rows.to(tl.int64)[:, None]
    row_mask = rows < M
    col_mask = cols < N
    mask = row_mask[:, None] & col_mask[None, :]
    if bias_ptr is not None:
        v += tl.load(bias_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        v = gelu(v)
    elif ACTIVATION == "gelu_tanh":
        v = gelu_tanh(v)
    elif ACTIVATION == "relu":
        v = tl.maximum(v, 0.0)
    if scale_ptr is not None:
        v *= tl.load(scale_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        v += tl.load(residual_ptr + rows_64 * STRIDE_RM + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    # What follows is of the rounded values where they are stored: those are what the next op reads.
    y = v
    if out_ptr is not None:
        y = v.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + rows_64 * STRIDE_OM + cols[None, :], y, mask=mask)
    if film_gamma_ptr is not None:
        sample = rows // rows_per_sample
        if task_ptr is not None:
            sample = tl.load(task_ptr + sample, mask=row_mask, other=0).to(tl.int32)
        film_at = sample.to(tl.int64)[:, None] * STRIDE_GAMMA + cols[None, :]
        gamma = tl.load(film_gamma_ptr + film_at, mask=mask, other=0.0).to(tl.float32)
        beta = tl.load(film_beta_ptr + film_at, mask=mask, other=0.0).to(tl.float32)
        y = y.to(tl.float32) * (1.0 + gamma) + beta
        if film_out_ptr is not None:
            y = y.to(film_out_ptr.dtype.element_ty)
            tl.store(film_out_ptr + rows_64 * STRIDE_FM + cols[None, :], y, mask=mask)
    wide = y.to(tl.float32)
    if eight_ptr is not None:
        q, q_scale = quantize_rows(tl.where(col_mask[None, :], wide, 0.0), eight_ptr.dtype.element_ty, LARGEST)
        tl.store(eight_ptr + rows_64 * STRIDE_EM + cols[None, :], q, mask=mask)
        tl.store(eight_scale_ptr + pid_n * stride_eight_scale + rows, q_scale, mask=row_mask)
    if stats_ptr is not None:
        store_row_stats(stats_ptr, stride_stats_plane, stride_stats_part, pid_n, rows, row_mask, wide, cols, N, BLOCK_N)


@triton.jit
def _product(
    x_at,  # (BLOCK_M, BLOCK_K) addresses of the first step
    w_at,  # (BLOCK_K, BLOCK_N)
    begin,  # steps of BLOCK_K
    end,
    K: tl.constexpr,
    STRIDE_XK: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x @ W^T over the steps [begin, end) of K, in fp32."""
    # Fewer rows than an MMA has become its columns: the product is then W @ x^T.
    SWAPPED: tl.constexpr = BLOCK_M < MMA_ROWS
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), tl.float32)
    for step in range(begin, end):
        if K % BLOCK_K == 0:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            left = K - step * BLOCK_K
            x = tl.load(x_at, mask=(k < left)[None, :], other=0.0)
            w = tl.load(w_at, mask=(k < left)[:, None], other=0.0)
        # "ieee" touches fp32 inputs alone, which are for checking rather than speed.
        if SWAPPED:
            acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        x_at += BLOCK_K * STRIDE_XK
        w_at += BLOCK_K * STRIDE_WK
    if SWAPPED:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _last_rows_tile(
    x_ptr,
    w_ptr,
    row_sum_ptr,
    stats_in_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    counter_ptr,
    stride_stats_in_plane,
    stride_stats_in_part,
    tile,
    split,
    samples,
    rows_per_sample,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_XM: tl.constexpr,
    STRIDE_XK: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    STRIDE_OM: tl.constexpr,
    STATS_WIDTH: tl.constexpr,
    LAST_ROWS: tl.constexpr,
    LAST_COLUMN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """Columns from LAST_COLUMN on of the last LAST_ROWS rows of each sample."""
    TILES_N: tl.constexpr = (N - LAST_COLUMN + BLOCK_N - 1) // BLOCK_N
    index = tile // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = index < samples * LAST_ROWS
    index = tl.minimum(index, samples * LAST_ROWS - 1)
    row = (index // LAST_ROWS + 1) * rows_per_sample - LAST_ROWS + index % LAST_ROWS
    column = LAST_COLUMN + tile % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.minimum(column, N - 1)
    k = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    begin = split * STEPS // SPLIT_K
    end = (split + 1) * STEPS // SPLIT_K
    row_64 = row.to(tl.int64)[:, None]
    x_at = x_ptr + row_64 * STRIDE_XM + (begin * BLOCK_K + k)[None, :] * STRIDE_XK
    w_at = w_ptr + col[None, :] * STRIDE_WN + (begin * BLOCK_K + k)[:, None] * STRIDE_WK
    acc = _product(x_at, w_at, begin, end, K, STRIDE_XK, STRIDE_WK, BLOCK_M, BLOCK_N, BLOCK_K)
    last = True
    if SPLIT_K > 1:
        acc, last = reduce_splits(acc, partial_ptr, counter_ptr, tile, split, SPLIT_K)
    if last:
        if stats_in_ptr is not None:
            mean, rstd = merge_row_stats(
                stats_in_ptr, stride_stats_in_plane, stride_stats_in_part, row, K, STATS_WIDTH, eps
            )
            acc = rstd[:, None] * (acc - mean[:, None] * tl.load(row_sum_ptr + col)[None, :])
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + col).to(tl.float32)[None, :]
        mask = valid[:, None] & (column < N)[None, :]
        tl.store(out_ptr + row_64 * STRIDE_OM + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows_per_sample"])
def _linear_kernel(
    x_ptr,  # (M, K)
    w_ptr,  # (N, K)
    row_sum_ptr,  # (N,) fp32: sums of the folded weight's rows; None without a norm
    stats_in_ptr,  # (2, parts, rows) fp32
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
    partial_ptr,  # (tiles, SPLIT_K, BLOCK_M, BLOCK_N) fp32
    counter_ptr,  # (tiles,) int32, zero between launches
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
    STRIDE_XK: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    STRIDE_RM: tl.constexpr,
    STRIDE_OM: tl.constexpr,
    STRIDE_FM: tl.constexpr,
    STRIDE_EM: tl.constexpr,
    STRIDE_GAMMA: tl.constexpr,
    STATS_WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LARGEST: tl.constexpr,
    LAST_ROWS: tl.constexpr,  # of each sample, which alone want the columns from LAST_COLUMN on; 0: all rows do
    LAST_COLUMN: tl.constexpr,
    LAST_BLOCK_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    COLUMNS: tl.constexpr = LAST_COLUMN if LAST_ROWS > 0 else N
    if LAST_ROWS > 0:
        before = tl.cdiv(M, BLOCK_M) * ((COLUMNS + BLOCK_N - 1) // BLOCK_N)
        if tile >= before:
            _last_rows_tile(
                x_ptr,
                w_ptr,
                row_sum_ptr,
                stats_in_ptr,
                bias_ptr,
                out_ptr,
                partial_ptr + before * (SPLIT_K * BLOCK_M * BLOCK_N) if SPLIT_K > 1 else None,
                counter_ptr + before if SPLIT_K > 1 else None,
                stride_stats_in_plane,
                stride_stats_in_part,
                tile - before,
                split,
                M // rows_per_sample,
                rows_per_sample,
                eps,
                N,
                K,
                STRIDE_XM,
                STRIDE_XK,
                STRIDE_WN,
                STRIDE_WK,
                STRIDE_OM,
                STATS_WIDTH,
                LAST_ROWS,
                LAST_COLUMN,
                LAST_BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                SPLIT_K,
            )
            return
    pid_m, pid_n = tile_index(tile, M, COLUMNS, BLOCK_M, BLOCK_N, GROUP_M)

    # Rows and columns past the edge re-read the last one: no mask in the loop, the stores are masked.
    row = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - pid_m * BLOCK_M)
    col = tl.minimum(tl.arange(0, BLOCK_N), COLUMNS - 1 - pid_n * BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    begin = split * STEPS // SPLIT_K
    end = (split + 1) * STEPS // SPLIT_K
    x_base = x_ptr + pid_m.to(tl.int64) * (BLOCK_M * STRIDE_XM)
    w_base = w_ptr + pid_n.to(tl.int64) * (BLOCK_N * STRIDE_WN)
    x_at = x_base + row[:, None] * STRIDE_XM + (begin * BLOCK_K + k)[None, :] * STRIDE_XK
    w_at = w_base + col[None, :] * STRIDE_WN + (begin * BLOCK_K + k)[:, None] * STRIDE_WK

    acc = _product(x_at, w_at, begin, end, K, STRIDE_XK, STRIDE_WK, BLOCK_M, BLOCK_N, BLOCK_K)
    last = True
    if SPLIT_K > 1:
        acc, last = reduce_splits(acc, partial_ptr, counter_ptr, tile, split, SPLIT_K)
    if last:
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
            COLUMNS,
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
def _row_stats_kernel(
    x_ptr,  # (M, K)
    stats_ptr,  # (2, 1, rows) fp32
    stride_stats_plane,
    M,
    K: tl.constexpr,
    STRIDE_XM: tl.constexpr,
    STRIDE_XK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    row_mask = rows < M
    at = x_ptr + rows.to(tl.int64)[:, None] * STRIDE_XM + k[None, :] * STRIDE_XK
    x = tl.load(at, mask=row_mask[:, None] & (k < K)[None, :], other=0.0).to(tl.float32)
    store_row_stats(stats_ptr, stride_stats_plane, 0, 0, rows, row_mask, x, k, K, K)


# ---------------------------------------------------------------------------------------------------------------
# Launchers: static buffers in, nothing allocated
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowStats:
    """Partial statistics of the rows of a (M, K) tensor, for a norm folded into the GEMM that reads it.

    values: (2, parts, rows >= M) fp32: means, then sums of squared deviations, each over `width` columns.
    """

    values: Tensor
    width: int


@dataclass(frozen=True)
class Film:
    """FiLM of a GEMM's result, written beside it: out = y * (1 + gamma) + beta.

    gamma, beta: (samples, N), or with `task_id` a table (tasks, N) of the same row stride.
    out: (M, N), or None where only the 8-bit copy of the result is read. task_id: (samples,) integers or None.
    rows_per_sample: M / samples.
    """

    gamma: Tensor
    beta: Tensor
    out: Tensor | None
    rows_per_sample: int
    task_id: Tensor | None = None


@dataclass(frozen=True)
class LastRows:
    """The last `rows` of every `rows_per_sample` rows: they alone get the columns from `column` on."""

    rows: int
    rows_per_sample: int
    column: int

    def block_m(self, arch: configs.Arch | None = None) -> int:
        """Rows of their tiles, the fewest that a target's MMA takes: NVIDIA's take 8 as columns."""
        return 8 if isinstance(configs.current_arch() if arch is None else arch, int) else 16

    def tiles(self, M: int, N: int, config: Mapping[str, Any], arch: configs.Arch | None = None) -> int:
        """How many tiles cover them in an (M, N) result."""
        rows = M // self.rows_per_sample * self.rows
        return triton.cdiv(rows, self.block_m(arch)) * triton.cdiv(N - self.column, config["BLOCK_N"])


@dataclass(frozen=True)
class Workspace:
    """Scratch for split K. One per stream: two launches that may overlap must not share it.

    partials: fp32; counters: int32, zero. Kernels leave the counters zero again.
    """

    partials: Tensor
    counters: Tensor

    @staticmethod
    def sizes(M: int, N: int, config: Mapping[str, Any], last: LastRows | None = None) -> tuple[int, int]:
        """(fp32 elements of partials, counters) that one launch needs; (0, 0) without a split."""
        if config["SPLIT_K"] == 1:
            return 0, 0
        tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(last.column if last else N, config["BLOCK_N"])
        few = last.tiles(M, N, config) if last else 0
        rows = tiles * config["BLOCK_M"] + (few * last.block_m() if last else 0)
        return rows * config["SPLIT_K"] * config["BLOCK_N"], tiles + few

    @classmethod
    def allocate(cls, sizes: tuple[int, int], device: torch.device | str) -> Workspace:
        """A workspace of at least `sizes` (take the maximum over the launches that share it)."""
        return cls(
            torch.empty(sizes[0], dtype=torch.float32, device=device),
            torch.zeros(sizes[1], dtype=torch.int32, device=device),
        )


def linear_config(
    M: int, N: int, K: int, dtype: torch.dtype, arch: configs.Arch | None = None, eight_out: bool = False
) -> dict[str, Any]:
    """The shipped configuration of ``launch_linear`` for a shape; BLOCK_N is the width of the statistics it leaves.

    eight_out: the launch also writes 8 bits, whose groups are the column tiles: BLOCK_N is the same on every target.
    """
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"linear takes {', '.join(DTYPE_NAMES.values())}, got {dtype}; cast the inputs")
    arch = configs.current_arch() if arch is None else arch
    table = GROUPED_CONFIGS if eight_out else CONFIGS
    return with_splits(configs.pick(table, arch, M=M, N=N, K=K, dtype=DTYPE_NAMES[dtype]), K)


def with_splits(config: dict[str, Any], K: int) -> dict[str, Any]:
    """The configuration with no more splits than a K smaller than the table's has steps."""
    return {**config, "SPLIT_K": min(config["SPLIT_K"], triton.cdiv(K, config["BLOCK_K"]))}


def stats_parts(N: int, width: int) -> int:
    """Number of parts in the statistics that a GEMM with column tiles of `width` leaves."""
    return triton.cdiv(N, width)


def launch_row_stats(x_MK: Tensor, stats: RowStats) -> None:
    """Statistics of each row of x in one part: one launch, for an x that no GEMM of ours wrote.

    Args:
        x_MK: (M, K), any strides, fp16, bf16 or fp32.
        stats: values (2, 1, >= M) fp32, width K; written.
    """
    M, K = x_MK.shape
    if stats.values.shape[:2] != (2, 1) or stats.values.shape[2] < M or stats.width != K:
        raise ValueError(
            f"row statistics of x {tuple(x_MK.shape)} need values (2, 1, {M}) and width {K}, "
            f"got {tuple(stats.values.shape)} and {stats.width}"
        )
    block_k = triton.next_power_of_2(K)
    block_m = max(1, 4096 // block_k)
    _row_stats_kernel[(triton.cdiv(M, block_m),)](
        x_MK,
        stats.values,
        stats.values.stride(0),
        M,
        K=K,
        STRIDE_XM=x_MK.stride(0),
        STRIDE_XK=x_MK.stride(1),
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=4,
    )


def launch_linear(
    x_MK: Tensor,
    weight_NK: Tensor,
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
    last: LastRows | None = None,
    workspace: Workspace | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """One launch: out = residual + layer_scale * act(norm(x) @ weight^T + bias), and what the next op wants to know.

    Args:
        x_MK: (M, K) fp16, bf16 or fp32, any strides; weight_NK: (N, K), same dtype, any strides.
        out_MN: (M, N), written; last stride 1. May be residual_MN itself. None: only FiLM or 8 bits of it are wanted.
        bias_N, layer_scale_N: (N,) any float dtype. residual_MN: (M, N), last stride 1.
        activation: one of ``ACTIVATIONS``.
        norm, row_sum_N, eps: statistics of x and the folded weight's row sums (``fold_layernorm``); both or neither.
        film: also write FiLM of the result. film.out may be residual_MN, with another out or none.
        stats_out: also write row statistics, of FiLM's result if film is given, else of out; width must be BLOCK_N.
        eight_out: also write 8 bits of what stats_out are of, in groups of BLOCK_N columns.
        last: write the columns from last.column on for some rows only; the others keep what they hold there. Only with
            a norm and a bias.
        workspace: needed when the configuration splits K.
        config: instead of the shipped configuration.

    Raises:
        ValueError: shapes, strides, dtypes or statistics that do not fit together.
    """
    M, K = x_MK.shape
    N = weight_NK.shape[0]
    columns = last.column if last else N
    if config is None:
        config = linear_config(M, columns, K, x_MK.dtype, eight_out=eight_out is not None)
    _check_linear(x_MK, weight_NK)
    check_inputs(M, N, K, bias_N, activation, residual_MN, layer_scale_N, norm, row_sum_N)
    check_outputs(M, N, out_MN, film, stats_out, eight_out, config["BLOCK_N"])
    if last:
        _check_last(M, N, last, activation, residual_MN, layer_scale_N, film, stats_out, eight_out)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
    tiles += last.tiles(M, N, config) if last else 0
    split_k = check_split(M, N, K, workspace, config, last)
    _linear_kernel[(tiles, split_k)](
        x_MK,
        weight_NK,
        row_sum_N,
        norm.values if norm else None,
        bias_N,
        layer_scale_N,
        residual_MN,
        out_MN,
        *epilogue_pointers(film, stats_out, eight_out),
        workspace.partials if workspace and split_k > 1 else None,
        workspace.counters if workspace and split_k > 1 else None,
        *(norm.values.stride()[:2] if norm else (0, 0)),
        *(stats_out.values.stride()[:2] if stats_out else (0, 0)),
        eight_out.scales.stride(0) if eight_out else 0,
        M,
        film.rows_per_sample if film else last.rows_per_sample if last else 1,
        eps,
        N=N,
        K=K,
        STRIDE_XM=x_MK.stride(0),
        STRIDE_XK=x_MK.stride(1),
        STRIDE_WN=weight_NK.stride(0),
        STRIDE_WK=weight_NK.stride(1),
        STATS_WIDTH=norm.width if norm else 0,
        ACTIVATION=activation,
        LAST_ROWS=last.rows if last else 0,
        LAST_COLUMN=last.column if last else 0,
        LAST_BLOCK_M=last.block_m() if last else 0,
        **epilogue_constants(residual_MN, out_MN, film, eight_out),
        **config,
    )


def epilogue_pointers(
    film: Film | None, stats_out: RowStats | None, eight_out: Quantized | None
) -> tuple[Tensor | None, ...]:
    """gamma, beta, task ids, FiLM output, statistics, 8 bits and their scales in the kernels' argument order."""
    rest = (
        stats_out.values if stats_out else None,
        eight_out.values if eight_out else None,
        eight_out.scales if eight_out else None,
    )
    return (film.gamma, film.beta, film.task_id, film.out, *rest) if film else (None, None, None, None, *rest)


def epilogue_constants(
    residual: Tensor | None, out: Tensor | None, film: Film | None, eight_out: Quantized | None
) -> dict[str, int | float]:
    """Row strides of what the epilogue touches, and the range of the 8-bit type."""
    return {
        "STRIDE_RM": residual.stride(0) if residual is not None else 0,
        "STRIDE_OM": out.stride(0) if out is not None else 0,
        "STRIDE_FM": film.out.stride(0) if film and film.out is not None else 0,
        "STRIDE_EM": eight_out.values.stride(0) if eight_out else 0,
        "STRIDE_GAMMA": film.gamma.stride(0) if film else 0,
        "LARGEST": LARGEST[eight_out.values.dtype] if eight_out else 0.0,
    }


def check_split(
    M: int, N: int, K: int, workspace: Workspace | None, config: dict[str, Any], last: LastRows | None = None
) -> int:
    """The configuration's SPLIT_K, once the workspace is known to be large enough and no split empty."""
    split_k = config["SPLIT_K"]
    if split_k == 1:
        return 1
    steps = triton.cdiv(K, config["BLOCK_K"])
    if split_k > steps:
        raise ValueError(f"SPLIT_K={split_k} leaves some of the {steps} K steps' splits empty; choose at most {steps}")
    partials, counters = Workspace.sizes(M, N, config, last)
    if workspace is None or workspace.partials.numel() < partials or workspace.counters.numel() < counters:
        given = "none" if workspace is None else f"{workspace.partials.numel()} and {workspace.counters.numel()}"
        raise ValueError(
            f"SPLIT_K={split_k} at M={M}, N={N} needs a workspace of {partials} partials and {counters} counters, "
            f"got {given}; allocate Workspace.sizes(M, N, config)"
        )
    return split_k


def check_outputs(
    M: int,
    N: int,
    out: Tensor | None,
    film: Film | None,
    stats_out: RowStats | None,
    eight_out: Quantized | None,
    block_n: int,
) -> None:
    """Reject what does not fit an (M, N) result in tiles of block_n columns, or leaves nothing to write."""
    if out is not None and (out.shape != (M, N) or out.stride(1) != 1):
        raise ValueError(f"out must be ({M}, {N}) with last stride 1, got {tuple(out.shape)} strides {out.stride()}")
    if out is None and eight_out is None and (film is None or film.out is None):
        raise ValueError("a linear needs something to write: out, film.out or eight_out; got none")
    if eight_out is not None:
        check_scales(eight_out)
        values = eight_out.values
        if values.shape != (M, N) or values.stride(1) != 1 or values.dtype not in LARGEST:
            raise ValueError(
                f"eight_out must be int8 or float8_e4m3fn ({M}, {N}) with last stride 1, got {values.dtype} "
                f"{tuple(values.shape)} strides {values.stride()}"
            )
        if eight_out.group != block_n:
            raise ValueError(
                f"an 8-bit result must be in groups of BLOCK_N={block_n} columns, got groups of {eight_out.group}"
            )
    if film is not None:
        samples = triton.cdiv(M, film.rows_per_sample)
        if M % film.rows_per_sample or film.gamma.shape != film.beta.shape or film.gamma.shape[1] != N:
            raise ValueError(
                f"FiLM of ({M}, {N}) needs gamma and beta (samples, {N}) and a number of rows per sample that divides "
                f"{M}, got {tuple(film.gamma.shape)}, {tuple(film.beta.shape)} and {film.rows_per_sample}"
            )
        given = film.gamma.shape[0] if film.task_id is None else film.task_id.numel()
        if given != samples:
            raise ValueError(f"FiLM needs one gamma row or task id for each of {samples} samples, got {given}")
        if film.gamma.stride() != film.beta.stride() or film.gamma.stride(1) != 1:
            raise ValueError("FiLM's gamma and beta need last stride 1 and the same strides")
        if film.out is not None and (film.out.shape != (M, N) or film.out.stride(1) != 1):
            raise ValueError(f"film.out must be ({M}, {N}) with last stride 1, got {tuple(film.out.shape)}")
    if stats_out is not None:
        parts = stats_parts(N, block_n)
        shape = stats_out.values.shape
        if stats_out.width != block_n or shape[:2] != (2, parts) or shape[2] < M:
            raise ValueError(
                f"statistics of ({M}, {N}) in tiles of {block_n} columns need width {block_n} and values "
                f"(2, {parts}, {M}), got {stats_out.width} and {tuple(shape)}"
            )


def _check_last(M: int, N: int, last: LastRows, activation: str, *others: object) -> None:
    if not 0 < last.rows <= last.rows_per_sample or M % last.rows_per_sample or not 0 < last.column < N:
        raise ValueError(f"the last rows of an ({M}, {N}) result cannot be {last}")
    if activation != "none" or any(other is not None for other in others):
        raise ValueError(
            "columns of the last rows alone go with a norm and a bias; leave out the epilogue's other parts"
        )


def _check_linear(x: Tensor, weight: Tensor) -> None:
    if weight.ndim != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} needs a weight (N, {x.shape[1]}) of the same dtype, "
            f"got {tuple(weight.shape)} {weight.dtype}"
        )


def check_inputs(
    M: int,
    N: int,
    K: int,
    bias_N: Tensor | None,
    activation: str,
    residual_MN: Tensor | None,
    layer_scale_N: Tensor | None,
    norm: RowStats | None,
    row_sum_N: Tensor | None,
) -> None:
    """Reject optional inputs that do not fit a product (M, K) @ (N, K)^T."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if residual_MN is not None and (residual_MN.shape != (M, N) or residual_MN.stride(1) != 1):
        raise ValueError(
            f"residual must be ({M}, {N}) with last stride 1, got {tuple(residual_MN.shape)} "
            f"strides {residual_MN.stride()}"
        )
    for name, tensor in (("bias", bias_N), ("layer_scale", layer_scale_N), ("row_sum", row_sum_N)):
        if tensor is not None and (tensor.shape != (N,) or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be a contiguous ({N},), got {tuple(tensor.shape)}; slice or copy it")
    if (norm is None) != (row_sum_N is None):
        raise ValueError("a folded norm needs both the row statistics and the weight's row sums, got one of them")
    if norm is not None and (
        norm.values.shape[:2] != (2, stats_parts(K, norm.width))
        or norm.values.shape[2] < M
        or norm.values.stride(2) != 1
    ):
        raise ValueError(
            f"statistics of {M} rows of {K} in parts of {norm.width} need shape "
            f"(2, {stats_parts(K, norm.width)}, {M}), got {tuple(norm.values.shape)}"
        )


# ---------------------------------------------------------------------------------------------------------------
# Custom ops
# ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("vat_fast::linear", mutates_args=(), device_types="cuda")
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    """residual + layer_scale * act(x @ weight^T + bias) in one launch; shapes as ``linear_ref``.

    Inference only: there is no backward. Allocates its result and, where K is split, its scratch; loops that must not
    allocate call ``launch_linear``.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    with torch.cuda.device_of(x):
        _linear_into(out, x_MK, weight, bias, activation, residual, layer_scale)
    return out


@torch.library.custom_op("vat_fast::norm_linear", mutates_args=(), device_types="cuda")
def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_sum: Tensor, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    """act(LayerNorm(x) @ weight^T + bias) for a weight from ``fold_layernorm``: a statistics pass and a GEMM.

    Args:
        x: (..., K); weight: (N, K); bias: (N,); row_sum: (N,) fp32, the sums of weight's rows.

    Returns:
        (..., N) in x's dtype. Inference only.
    """
    x_MK = x.reshape(-1, x.shape[-1])
    stats = RowStats(x.new_empty(2, 1, x_MK.shape[0], dtype=torch.float32), x_MK.shape[1])
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    with torch.cuda.device_of(x):
        launch_row_stats(x_MK, stats)
        _linear_into(out, x_MK, weight, bias, activation, None, None, norm=stats, row_sum_N=row_sum, eps=eps)
    return out


def _linear_into(
    out: Tensor,
    x_MK: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    **norm: Any,
) -> None:
    M, N, K = x_MK.shape[0], weight.shape[0], weight.shape[1]
    config = linear_config(M, N, K, x_MK.dtype)
    launch_linear(
        x_MK,
        weight,
        out.view(M, N),
        bias_N=bias,
        activation=activation,
        residual_MN=None if residual is None else residual.reshape(M, N),
        layer_scale_N=layer_scale,
        workspace=Workspace.allocate(Workspace.sizes(M, N, config), x_MK.device),
        config=config,
        **norm,
    )


@linear.register_kernel("cpu")
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    return linear_ref(x, weight, bias, activation, residual, layer_scale)


@norm_linear.register_kernel("cpu")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_sum: Tensor, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    return norm_linear_ref(x, weight, None if bias is None else bias.to(x.dtype), eps, activation)


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@norm_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, row_sum: Tensor, eps: float = 1e-6, activation: str = "none"
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# ---------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------


# fp32 is for checking: small tiles, since every product is done on the ordinary cores.
_FP32 = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 8, "SPLIT_K": 1, "num_warps": 4, "num_stages": 2}

CONFIGS: configs.ConfigTable = {
    arch: [({"dtype": "fp32"}, _FP32), *configs.rules(rows)] for arch, rows in tables.LINEAR.items()
}
GROUPED_CONFIGS: configs.ConfigTable = {arch: configs.rules(rows) for arch, rows in tables.GROUPED_LINEAR.items()}
