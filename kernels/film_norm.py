"""FiLM followed by LayerNorm: how the task speaks to the action tokens before they attend.

    u = x * (1 + gamma) + beta        y = (u - mean(u)) * rstd(u) * weight + bias

FiLM: Perez et al., arXiv 1709.07871. gamma and beta are one row per sample, or rows of a table picked by task id.
Without them the op is a plain LayerNorm.

Backward, with n = (u - mean) * rstd, g = dy * weight and means over the D columns:

    du = rstd * (g - mean(g) - n * mean(g * n))      dx = du * (1 + gamma)
    dgamma = sum_rows du * x      dbeta = sum_rows du      dweight = sum_rows dy * n      dbias = sum_rows dy

The four sums run in two stages, a partial per program and then a sum in a fixed order: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vat_fast.kernels import configs

# ---------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------


def film_layernorm_ref(
    x_BND: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    task_id: Tensor | None = None,
) -> Tensor:
    """LN(x * (1 + gamma) + beta) * weight + bias with torch ops, in any float dtype.

    Args:
        x_BND: (B, N, D).
        gamma, beta: (B, D); or a table (tasks, D) with `task_id`; or both None for no FiLM.
        weight_D, bias_D: (D,).
        task_id: (B,) integers or None.

    Returns:
        (B, N, D) in x's dtype.
    """
    if gamma is not None and beta is not None:
        if task_id is not None:
            gamma, beta = gamma[task_id], beta[task_id]
        x_BND = x_BND * (1 + gamma[:, None]) + beta[:, None]
    return torch.nn.functional.layer_norm(x_BND, x_BND.shape[-1:], weight_D, bias_D, eps)


# ---------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_film(gamma_ptr, beta_ptr, task_ptr, sample, cols, mask, STRIDE_FILM: tl.constexpr):
    """(1 + gamma, beta) of one sample, fp32."""
    row = sample
    if task_ptr is not None:
        row = tl.load(task_ptr + sample)
    at = row.to(tl.int64) * STRIDE_FILM + cols
    scale = 1.0 + tl.load(gamma_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return scale, tl.load(beta_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _film_layernorm_kernel(
    x_ptr,  # (B, N, D)
    gamma_ptr,  # (B or tasks, D) or None
    beta_ptr,
    task_ptr,  # (B,) or None
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    out_ptr,  # (B, N, D)
    mean_ptr,  # (B, N) fp32
    rstd_ptr,  # (B, N) fp32
    stride_xb,
    stride_ob,
    num_rows,  # N
    eps,
    STRIDE_XN: tl.constexpr,
    STRIDE_ON: tl.constexpr,
    STRIDE_FILM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least D
):
    """One token per program. Grid: (N, B)."""
    row = tl.program_id(0)
    sample = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x_row = x_ptr + sample.to(tl.int64) * stride_xb + row.to(tl.int64) * STRIDE_XN
    u = tl.load(x_row + cols, mask=mask, other=0.0).to(tl.float32)
    if gamma_ptr is not None:
        scale, shift = _load_film(gamma_ptr, beta_ptr, task_ptr, sample, cols, mask, STRIDE_FILM)
        u = u * scale + shift
    mean = tl.sum(u, 0) / D
    centred = tl.where(mask, u - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    token = sample.to(tl.int64) * num_rows + row
    y = centred * rstd * weight + bias
    out_row = out_ptr + sample.to(tl.int64) * stride_ob + row.to(tl.int64) * STRIDE_ON
    tl.store(out_row + cols, y.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + token, mean)
    tl.store(rstd_ptr + token, rstd)


@triton.jit
def _film_layernorm_backward_kernel(
    grad_ptr,  # (B, N, D): dy
    x_ptr,  # (B, N, D)
    gamma_ptr,  # (B or tasks, D) or None
    beta_ptr,
    task_ptr,  # (B,) or None
    weight_ptr,  # (D,)
    mean_ptr,  # (B, N) fp32
    rstd_ptr,  # (B, N) fp32
    residual_ptr,  # (B, N, D) contiguous or None: added to dx
    dx_ptr,  # (B, N, D) contiguous
    partial_ptr,  # (4, B, parts, D) fp32: dweight, dbias, dgamma, dbeta; the last two only with FiLM
    stride_gb,
    stride_xb,
    stride_plane,  # of partial_ptr
    num_rows,  # N
    rows_per_part,
    STRIDE_GN: tl.constexpr,
    STRIDE_XN: tl.constexpr,
    STRIDE_FILM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """rows_per_part tokens of one sample per program. Grid: (parts, B)."""
    part = tl.program_id(0)
    sample = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if gamma_ptr is not None:
        scale, shift = _load_film(gamma_ptr, beta_ptr, task_ptr, sample, cols, mask, STRIDE_FILM)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_D], tl.float32)
    dgamma = tl.zeros([BLOCK_D], tl.float32)
    dbeta = tl.zeros([BLOCK_D], tl.float32)

    first = part * rows_per_part
    token = sample.to(tl.int64) * num_rows + first
    x_row = x_ptr + sample.to(tl.int64) * stride_xb + first.to(tl.int64) * STRIDE_XN
    grad_row = grad_ptr + sample.to(tl.int64) * stride_gb + first.to(tl.int64) * STRIDE_GN
    for _ in range(first, tl.minimum(first + rows_per_part, num_rows)):
        x = tl.load(x_row + cols, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_row + cols, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + token)
        rstd = tl.load(rstd_ptr + token)
        u = x
        if gamma_ptr is not None:
            u = x * scale + shift
        n = tl.where(mask, (u - mean) * rstd, 0.0)
        g = grad * weight
        du = rstd * (g - tl.sum(g, 0) / D - n * (tl.sum(g * n, 0) / D))
        dweight += grad * n
        dbias += grad
        dx = du
        if gamma_ptr is not None:
            dgamma += du * x
            dbeta += du
            dx = du * scale
        if residual_ptr is not None:
            dx += tl.load(residual_ptr + token * D + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + token * D + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        token += 1
        x_row += STRIDE_XN
        grad_row += STRIDE_GN

    at = partial_ptr + (sample.to(tl.int64) * tl.num_programs(0) + part) * D + cols
    tl.store(at, dweight, mask=mask)
    tl.store(at + stride_plane, dbias, mask=mask)
    if gamma_ptr is not None:
        tl.store(at + 2 * stride_plane, dgamma, mask=mask)
        tl.store(at + 3 * stride_plane, dbeta, mask=mask)


@triton.jit
def _sum_rows(ptr, first, count, keep, cols, col_mask, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of `count` consecutive rows from `first`, BLOCK_P at a time; zero unless `keep`."""
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, count, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < count)[:, None] & col_mask[None, :] & keep
        at = ptr + (first + rows).to(tl.int64)[:, None] * D + cols[None, :]
        total += tl.load(at, mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _film_layernorm_sum_kernel(
    partial_ptr,  # (4, B, parts, D) fp32
    task_ptr,  # (B,) or None
    dweight_ptr,  # (D,)
    dbias_ptr,  # (D,)
    dgamma_ptr,  # (B or tasks, D) contiguous, or None
    dbeta_ptr,
    stride_plane,
    batch,
    parts,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Second stage. Grid: (column blocks, 1 + rows of dgamma); program (., 0) sums dweight and dbias over everything,
    program (., 1 + r) sums dgamma and dbeta of row r."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = cols < D
    if tl.program_id(1) == 0:
        dweight = _sum_rows(partial_ptr, 0, batch * parts, True, cols, mask, D, BLOCK_P, BLOCK_D)
        dbias = _sum_rows(partial_ptr + stride_plane, 0, batch * parts, True, cols, mask, D, BLOCK_P, BLOCK_D)
        tl.store(dweight_ptr + cols, dweight.to(dweight_ptr.dtype.element_ty), mask=mask)
        tl.store(dbias_ptr + cols, dbias.to(dbias_ptr.dtype.element_ty), mask=mask)
    elif dgamma_ptr is not None:
        row = tl.program_id(1) - 1
        gamma_plane = partial_ptr + 2 * stride_plane
        if task_ptr is None:
            dgamma = _sum_rows(gamma_plane, row * parts, parts, True, cols, mask, D, BLOCK_P, BLOCK_D)
            dbeta = _sum_rows(gamma_plane + stride_plane, row * parts, parts, True, cols, mask, D, BLOCK_P, BLOCK_D)
        else:
            # Samples of other tasks are read as zero: masked lanes fetch nothing.
            dgamma = tl.zeros([BLOCK_D], tl.float32)
            dbeta = tl.zeros([BLOCK_D], tl.float32)
            for sample in range(0, batch):
                mine = tl.load(task_ptr + sample) == row
                first = sample * parts
                dgamma += _sum_rows(gamma_plane, first, parts, mine, cols, mask, D, BLOCK_P, BLOCK_D)
                dbeta += _sum_rows(gamma_plane + stride_plane, first, parts, mine, cols, mask, D, BLOCK_P, BLOCK_D)
        at = row.to(tl.int64) * D + cols
        tl.store(dgamma_ptr + at, dgamma.to(dgamma_ptr.dtype.element_ty), mask=mask)
        tl.store(dbeta_ptr + at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------------------------
# Launchers
# ---------------------------------------------------------------------------------------------------------------

# Programs that the backward aims at: about two on each of an H100's 132 multiprocessors.
BACKWARD_PROGRAMS = 256


def launch_film_layernorm(
    x_BND: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    task_id: Tensor | None,
    out_BND: Tensor,
    mean_BN: Tensor,
    rstd_BN: Tensor,
) -> None:
    """Write y, mean and rstd in one launch.

    Args:
        x_BND ... task_id: as `film_layernorm`; x's and the FiLM rows' last stride is 1.
        out_BND: (B, N, D), last stride 1. mean_BN, rstd_BN: (B, N) fp32 contiguous.

    Raises:
        ValueError: shapes or strides that do not fit together.
    """
    B, N, D = x_BND.shape
    _check(x_BND, gamma, beta, weight_D, bias_D, task_id)
    if out_BND.shape != x_BND.shape or out_BND.stride(-1) != 1:
        raise ValueError(
            f"out must be {tuple(x_BND.shape)} with last stride 1, got {tuple(out_BND.shape)} "
            f"strides {out_BND.stride()}"
        )
    config = configs.pick(CONFIGS, configs.current_arch(), D=D)
    _film_layernorm_kernel[(N, B)](
        x_BND, gamma, beta, task_id, weight_D, bias_D, out_BND, mean_BN, rstd_BN,
        x_BND.stride(0), out_BND.stride(0), N, eps,
        STRIDE_XN=x_BND.stride(1), STRIDE_ON=out_BND.stride(1), STRIDE_FILM=0 if gamma is None else gamma.stride(0),
        D=D, BLOCK_D=triton.next_power_of_2(D), **config,
    )  # fmt: skip


def backward_parts(batch: int, num_rows: int) -> tuple[int, int]:
    """(parts, rows per part) into which the backward cuts a sample's rows to fill the machine."""
    wanted = max(1, min(BACKWARD_PROGRAMS // batch, triton.cdiv(num_rows, 2)))
    rows_per_part = triton.cdiv(num_rows, wanted)
    return triton.cdiv(num_rows, rows_per_part), rows_per_part


def launch_film_layernorm_backward(
    grad_BND: Tensor,
    x_BND: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight_D: Tensor,
    mean_BN: Tensor,
    rstd_BN: Tensor,
    task_id: Tensor | None,
    dx_BND: Tensor,
    dgamma: Tensor | None,
    dbeta: Tensor | None,
    dweight_D: Tensor,
    dbias_D: Tensor,
    residual_BND: Tensor | None = None,
) -> None:
    """Write every gradient in two launches.

    Args:
        grad_BND: dy, last stride 1.
        x_BND ... task_id: what the forward read and wrote.
        dx_BND: (B, N, D) contiguous. dgamma, dbeta: gamma's shape, contiguous, or None without FiLM.
        dweight_D, dbias_D: (D,).
        residual_BND: (B, N, D) contiguous, added to dx: the gradient that reaches x past the norm.

    Raises:
        ValueError: shapes or strides that do not fit together.
    """
    B, N, D = x_BND.shape
    _check(x_BND, gamma, beta, weight_D, weight_D, task_id)
    if grad_BND.shape != x_BND.shape or grad_BND.stride(-1) != 1:
        raise ValueError(f"the gradient must be {tuple(x_BND.shape)} with last stride 1, got {tuple(grad_BND.shape)}")
    parts, rows_per_part = backward_parts(B, N)
    planes = 2 if gamma is None else 4
    partial = torch.empty(planes, B, parts, D, dtype=torch.float32, device=x_BND.device)
    config = configs.pick(CONFIGS, configs.current_arch(), D=D)
    _film_layernorm_backward_kernel[(parts, B)](
        grad_BND, x_BND, gamma, beta, task_id, weight_D, mean_BN, rstd_BN, residual_BND, dx_BND, partial,
        grad_BND.stride(0), x_BND.stride(0), partial.stride(0), N, rows_per_part,
        STRIDE_GN=grad_BND.stride(1), STRIDE_XN=x_BND.stride(1),
        STRIDE_FILM=0 if gamma is None else gamma.stride(0),
        D=D, BLOCK_D=triton.next_power_of_2(D), **config,
    )  # fmt: skip
    block_d = 128
    film_rows = 0 if dgamma is None else dgamma.shape[0]
    _film_layernorm_sum_kernel[(triton.cdiv(D, block_d), 1 + film_rows)](
        partial, task_id, dweight_D, dbias_D, dgamma, dbeta, partial.stride(0), B, parts,
        D=D, BLOCK_P=16, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def _check(
    x_BND: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    task_id: Tensor | None,
) -> None:
    B, _, D = x_BND.shape
    if x_BND.stride(-1) != 1:
        raise ValueError(f"x has stride {x_BND.stride(-1)} along its last axis, expected 1: call .contiguous() first")
    for name, vector in (("weight", weight_D), ("bias", bias_D)):
        if vector.shape != (D,) or not vector.is_contiguous():
            raise ValueError(
                f"{name} must be a contiguous ({D},) for x {tuple(x_BND.shape)}, got {tuple(vector.shape)}"
            )
    if (gamma is None) != (beta is None):
        raise ValueError("FiLM needs both gamma and beta, got one of them: give both or neither")
    if gamma is None or beta is None:
        if task_id is not None:
            raise ValueError("task_id picks rows of gamma and beta, but they are None: give the tables too")
        return
    rows = "tasks" if task_id is not None else str(B)
    if gamma.ndim != 2 or gamma.shape[1] != D or (task_id is None and gamma.shape[0] != B):
        raise ValueError(f"gamma must be ({rows}, {D}) for x {tuple(x_BND.shape)}, got {tuple(gamma.shape)}")
    if beta.shape != gamma.shape:
        raise ValueError(f"beta must have gamma's shape {tuple(gamma.shape)}, got {tuple(beta.shape)}")
    if beta.stride() != gamma.stride() or gamma.stride(1) != 1:
        raise ValueError(
            f"gamma and beta must have equal strides, the last 1, got {gamma.stride()} and {beta.stride()}: "
            "call .contiguous() on both"
        )
    if task_id is not None and (task_id.shape != (B,) or task_id.dtype not in (torch.int32, torch.int64)):
        raise ValueError(f"task_id must be ({B},) int32 or int64, got {tuple(task_id.shape)} {task_id.dtype}")


# ---------------------------------------------------------------------------------------------------------------
# Custom ops
# ---------------------------------------------------------------------------------------------------------------


def film_layernorm(
    x_BND: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    task_id: Tensor | None = None,
) -> Tensor:
    """LN(x * (1 + gamma) + beta) * weight + bias, differentiable in x, gamma, beta, weight and bias.

    Args:
        x_BND: (B, N, D), any strides (copied unless the last is 1), fp16, bf16 or fp32; on the CPU fp64 too.
        gamma, beta: (B, D); or a table (tasks, D) with `task_id`; or both None for a plain LayerNorm. Any float dtype.
        weight_D, bias_D: (D,), any float dtype.
        eps: added to the variance.
        task_id: (B,) int32 or int64, or None. Ids must be valid rows of the table: a GPU does not check.

    Returns:
        (B, N, D) contiguous, in x's dtype; sums are in fp32.

    Raises:
        ValueError: shapes, strides or dtypes that do not fit together.
    """
    return _film_layernorm_op(x_BND, gamma, beta, weight_D, bias_D, eps, task_id)[0]


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its last stride is 1, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


@torch.library.custom_op("vat_fast::film_layernorm", mutates_args=(), device_types="cuda")
def _film_layernorm_op(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    task_id: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    launch_film_layernorm(rows_contiguous(x), gamma, beta, weight, bias, eps, task_id, out, mean, rstd)
    return out, mean, rstd


@torch.library.custom_op("vat_fast::film_layernorm_backward", mutates_args=(), device_types="cuda")
def _film_layernorm_backward_op(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    task_id: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta, dweight, dbias); dgamma and dbeta are empty without FiLM."""
    dx, dgamma, dbeta, dweight, dbias = _empty_gradients(x, gamma, weight)
    film = gamma is not None
    launch_film_layernorm_backward(
        rows_contiguous(grad), rows_contiguous(x), gamma, beta, weight, mean, rstd, task_id,
        dx, dgamma if film else None, dbeta if film else None, dweight, dbias,
    )  # fmt: skip
    return dx, dgamma, dbeta, dweight, dbias


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _empty_gradients(x: Tensor, gamma: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    film = weight.new_empty(0) if gamma is None else gamma
    shapes = (x, film, film, weight, weight)
    dx, dgamma, dbeta, dweight, dbias = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in shapes)
    return dx, dgamma, dbeta, dweight, dbias


@_film_layernorm_op.register_fake
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    task_id: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(x.dtype)
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=wide), x.new_empty(x.shape[:2], dtype=wide)


@_film_layernorm_backward_op.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    task_id: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(x, gamma, weight)


def _modulated(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, task_id: Tensor | None, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(u, 1 + gamma per sample), both wide."""
    if gamma is None or beta is None:
        return x.to(wide), None
    if task_id is not None:
        gamma, beta = gamma[task_id], beta[task_id]
    scale = 1 + gamma.to(wide)[:, None]
    return x.to(wide) * scale + beta.to(wide)[:, None], scale


@_film_layernorm_op.register_kernel("cpu")
def _(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    task_id: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(rows_contiguous(x), gamma, beta, weight, bias, task_id)
    wide = _wide(x.dtype)
    u, _ = _modulated(x, gamma, beta, task_id, wide)
    variance, mean = torch.var_mean(u, dim=-1, correction=0)
    rstd = torch.rsqrt(variance + eps)
    y = (u - mean[..., None]) * rstd[..., None] * weight.to(wide) + bias.to(wide)
    return y.to(x.dtype).contiguous(), mean.contiguous(), rstd.contiguous()


@_film_layernorm_backward_op.register_kernel("cpu")
def _(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    task_id: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(x.dtype)
    u, scale = _modulated(x, gamma, beta, task_id, wide)
    dy, n = grad.to(wide), (u - mean[..., None]) * rstd[..., None]
    g = dy * weight.to(wide)
    du = rstd[..., None] * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    dweight, dbias = (dy * n).sum((0, 1)).to(weight.dtype), dy.sum((0, 1)).to(weight.dtype)
    if gamma is None or scale is None:
        empty = weight.new_empty(0)
        return du.to(x.dtype).contiguous(), empty, empty.clone(), dweight, dbias
    dgamma, dbeta = (du * x.to(wide)).sum(1), du.sum(1)
    if task_id is not None:
        table = torch.zeros(gamma.shape, dtype=wide)
        dgamma, dbeta = table.index_add(0, task_id, dgamma), table.index_add(0, task_id, dbeta)
    return (du * scale).to(x.dtype).contiguous(), dgamma.to(gamma.dtype), dbeta.to(gamma.dtype), dweight, dbias


def _setup_context(ctx, inputs, output) -> None:
    x, gamma, beta, weight, _, _, task_id = inputs
    ctx.save_for_backward(x, gamma, beta, weight, output[1], output[2], task_id)
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx, grad, *_):
    gamma = ctx.saved_tensors[1]
    dx, dgamma, dbeta, dweight, dbias = _film_layernorm_backward_op(grad, *ctx.saved_tensors)
    if gamma is None:
        return dx, None, None, dweight, dbias, None, None
    return dx, dgamma, dbeta, dweight, dbias, None, None


_film_layernorm_op.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------

CONFIGS: dict[configs.Arch, list[tuple[dict[str, int], dict[str, int]]]] = {
    "default": [
        ({"D": 1024}, {"num_warps": 4}),  # one 16-byte load of bf16 for each thread and two rounds at most
        ({}, {"num_warps": 8}),
    ],
}
