"""Patch embedding from camera images: crop, scale, normalise, project and add the position in one launch.

The images stay uint8 until they reach the tensor cores. With u the raw pixel, W the patch projection and m, s the
channel mean and standard deviation,

    W @ ((u / 255 - m) / s) + b  =  W' @ (u - 128) + b',   W' = W / (255 s),   b' = b + W @ ((128 / 255 - m) / s)

and u - 128 is exact in bf16 and fp16, so normalisation costs nothing and rounds nothing but the weight. Bias, position
and the class and register tokens in front of the patches are one additive table (``pack_patch_embed``).

Inference only: no backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vat_fast.kernels import configs, tables
from vat_fast.kernels.gemm import DTYPE_NAMES, RowStats, check_outputs, store_row_stats, tile_index

# uint8 centred on this is exact in bf16, fp16 and int8.
PIXEL_CENTRE = 128


# ---------------------------------------------------------------------------------------------------------------
# Reference
# ---------------------------------------------------------------------------------------------------------------


def patch_embed_ref(
    images_BVHWC: Tensor,
    weight_DCPP: Tensor,
    bias_D: Tensor,
    position_LD: Tensor,
    prefix_ED: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    crop: tuple[int, int] = (0, 0),
) -> Tensor:
    """Vision tokens from raw images, one torch op at a time, in weight_DCPP's dtype.

    Args:
        images_BVHWC: (B, V, H, W, 3) uint8.
        weight_DCPP, bias_D: the patch convolution, (D, 3, P, P) and (D,).
        position_LD: (L, D) for a square grid of L patches. prefix_ED: tokens put in front of every view, or None.
        mean, std: per channel, of pixels scaled to [0, 1].
        crop: (top, left) of the square that is used.

    Returns:
        (B, V, prefix + L, D).
    """
    dtype, patch = weight_DCPP.dtype, weight_DCPP.shape[-1]
    side = patch * _grid_side(position_LD.shape[0])
    B, V = images_BVHWC.shape[:2]
    x = images_BVHWC[:, :, crop[0] : crop[0] + side, crop[1] : crop[1] + side].to(dtype) / 255
    x = (x - torch.tensor(mean, dtype=dtype, device=x.device)) / torch.tensor(std, dtype=dtype, device=x.device)
    x = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), weight_DCPP, bias_D.to(dtype), stride=patch)
    tokens = x.flatten(2).transpose(1, 2) + position_LD.to(dtype)
    if prefix_ED is not None:
        tokens = torch.cat([prefix_ED.to(dtype).expand(B * V, -1, -1), tokens], 1)
    return tokens.unflatten(0, (B, V))


def pack_patch_embed(
    weight_DCPP: Tensor,
    bias_D: Tensor,
    position_LD: Tensor,
    prefix_ED: Tensor | None,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Weights in the kernel's form; arguments as ``patch_embed_ref``.

    Returns:
        weight (D, K) in `dtype`: normalisation folded in, features in image order (patch row, patch column, channel),
        K = 3 P^2 padded with zeros to a multiple of 16 so that rows stay 16-byte aligned;
        table (prefix + L, D) fp32: prefix tokens, then position + bias.
    """
    wide = weight_DCPP.double()
    centre = torch.tensor([PIXEL_CENTRE / 255 - m for m in mean], dtype=torch.float64, device=wide.device)
    spread = torch.tensor(list(std), dtype=torch.float64, device=wide.device)
    bias = bias_D.double() + torch.einsum("dcij,c->d", wide, centre / spread)
    weight = (wide / (255 * spread)[:, None, None]).permute(0, 2, 3, 1).flatten(1)
    weight = F.pad(weight, (0, -weight.shape[1] % 16))
    table = position_LD.double() + bias
    if prefix_ED is not None:
        table = torch.cat([prefix_ED.double(), table])
    return weight.to(dtype).contiguous(), table.float().contiguous()


def _grid_side(patches: int) -> int:
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(f"patch_embed needs a square grid of patches, got {patches} positions")
    return side


# ---------------------------------------------------------------------------------------------------------------
# Kernel
# ---------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "top", "left"])
def _patch_embed_kernel(
    image_ptr,  # (B, V, H, W, 3) uint8, each view contiguous
    w_ptr,  # (D, K)
    table_ptr,  # (prefix + patches, D) fp32
    out_ptr,  # (M, D) rows STRIDE_OM apart, M = B * V * (prefix + patches)
    stats_ptr,  # (2, parts, M) fp32 or None
    stride_stats_plane,
    stride_stats_part,
    M,
    top,
    left,
    VIEWS: tl.constexpr,
    STRIDE_B: tl.constexpr,
    STRIDE_V: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_OM: tl.constexpr,
    PATCH: tl.constexpr,
    GRID: tl.constexpr,  # patches per side
    PREFIX: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,  # padded
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    TOKENS: tl.constexpr = PREFIX + GRID * GRID
    RUN: tl.constexpr = PATCH * 3  # bytes of one patch row, contiguous in the image
    pid_m, pid_n = tile_index(tl.program_id(0), M, D, BLOCK_M, BLOCK_N, GROUP_M)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    view = rows // TOKENS
    token = rows % TOKENS
    patch = token - PREFIX
    is_patch = (rows < M) & (patch >= 0)
    corner = (
        (view // VIEWS).to(tl.int64) * STRIDE_B
        + (view % VIEWS).to(tl.int64) * STRIDE_V
        + (top + patch // GRID * PATCH) * STRIDE_H
        + (left + patch % GRID * PATCH) * 3
    )
    k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + tl.minimum(cols, D - 1)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        feature = start + k
        offset = feature // RUN * STRIDE_H + feature % RUN
        pixel_mask = is_patch[:, None] & (feature < PATCH * RUN)[None, :]
        pixel = tl.load(image_ptr + corner[:, None] + offset[None, :], mask=pixel_mask, other=0)
        # The padded features meet zero weights; a prefix row's product is dropped below.
        x = (pixel.to(tl.int32) - 128).to(w_ptr.dtype.element_ty)
        # A mask that always holds compiles to nothing.
        w = tl.load(w_at, mask=(feature < K)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        w_at += BLOCK_K
    col_mask = cols < D
    mask = (rows < M)[:, None] & col_mask[None, :]
    table = tl.load(table_ptr + token[:, None] * D + cols[None, :], mask=mask, other=0.0)
    y = (tl.where(is_patch[:, None], acc, 0.0) + table).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * STRIDE_OM + cols[None, :], y, mask=mask)
    if stats_ptr is not None:
        wide = y.to(tl.float32)
        store_row_stats(stats_ptr, stride_stats_plane, stride_stats_part, pid_n, rows, rows < M, wide, cols, D, BLOCK_N)


# ---------------------------------------------------------------------------------------------------------------
# Launcher
# ---------------------------------------------------------------------------------------------------------------


def patch_embed_config(M: int, D: int, dtype: torch.dtype, arch: configs.Arch | None = None) -> dict[str, Any]:
    """The shipped configuration for M tokens of width D; BLOCK_N is the width of the statistics it leaves."""
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"patch_embed writes {', '.join(DTYPE_NAMES.values())}, got {dtype}; convert the weights")
    arch = configs.current_arch() if arch is None else arch
    return configs.pick(CONFIGS, arch, M=M, N=D, K=0, dtype=DTYPE_NAMES[dtype])


def launch_patch_embed(
    images_BVHWC: Tensor,
    weight_DK: Tensor,
    table_LD: Tensor,
    out_BVLD: Tensor,
    *,
    patch: int,
    prefix: int = 0,
    crop: tuple[int, int] = (0, 0),
    stats_out: RowStats | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """One launch from raw images to vision tokens (and the row statistics of the first norm).

    Args:
        images_BVHWC: (B, V, H, W, 3) uint8; each view's pixels contiguous along W and 3, any strides above.
        weight_DK, table_LD: from ``pack_patch_embed``.
        out_BVLD: (B, V, prefix + patches, D), weight_DK's dtype, all rows the same stride apart; written.
        patch: pixels per patch side. prefix: tokens in front of each view's patches.
        crop: (top, left) of the square of patches inside the image.
        stats_out: row statistics of the tokens, width BLOCK_N; written.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a crop that leaves the image.
    """
    D, K = weight_DK.shape
    B, V = images_BVHWC.shape[:2]
    L = table_LD.shape[0]
    grid = _grid_side(L - prefix)
    _check_patch_embed(images_BVHWC, weight_DK, table_LD, out_BVLD, patch, grid, crop)
    M = B * V * L
    if config is None:
        config = patch_embed_config(M, D, weight_DK.dtype)
    check_outputs(M, D, out_BVLD.flatten(0, 2), None, stats_out, None, config["BLOCK_N"])
    _patch_embed_kernel[(triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(D, config["BLOCK_N"]),)](
        images_BVHWC,
        weight_DK,
        table_LD,
        out_BVLD,
        stats_out.values if stats_out else None,
        *(stats_out.values.stride()[:2] if stats_out else (0, 0)),
        M,
        *crop,
        VIEWS=V,
        STRIDE_B=images_BVHWC.stride(0),
        STRIDE_V=images_BVHWC.stride(1),
        STRIDE_H=images_BVHWC.stride(2),
        STRIDE_OM=out_BVLD.stride(2),
        PATCH=patch,
        GRID=grid,
        PREFIX=prefix,
        D=D,
        K=K,
        **config,
    )


def _check_patch_embed(
    images: Tensor, weight: Tensor, table: Tensor, out: Tensor, patch: int, grid: int, crop: tuple[int, int]
) -> None:
    B, V, H, W, channels = images.shape
    if images.dtype != torch.uint8 or channels != 3:
        raise ValueError(f"images must be uint8 (B, V, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    if images.stride()[3:] != (3, 1):
        raise ValueError(f"image rows must be contiguous, got strides {images.stride()}; call .contiguous()")
    features = 3 * patch * patch
    if weight.shape[1] != features + -features % 16 or not weight.is_contiguous():
        raise ValueError(f"patch size {patch} needs the weight of pack_patch_embed, got {tuple(weight.shape)}")
    L, D = table.shape
    if weight.shape[0] != D or table.dtype != torch.float32 or not table.is_contiguous():
        raise ValueError(f"the table must be fp32 (tokens, {weight.shape[0]}), got {table.dtype} {tuple(table.shape)}")
    row = out.stride(-2) if out.ndim == 4 else 0
    if out.shape != (B, V, L, D) or out.dtype != weight.dtype or out.stride() != (V * L * row, L * row, row, 1):
        raise ValueError(
            f"out must be {(B, V, L, D)} {weight.dtype} with evenly spaced rows, got {tuple(out.shape)} {out.dtype} "
            f"strides {out.stride()}"
        )
    side = grid * patch
    if min(crop) < 0 or crop[0] + side > H or crop[1] + side > W:
        raise ValueError(f"a crop of {side}x{side} at {crop} leaves the {H}x{W} image; move it or resize the image")


# ---------------------------------------------------------------------------------------------------------------
# Custom op
# ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("vat_fast::patch_embed", mutates_args=(), device_types="cuda")
def patch_embed(
    images_BVHWC: Tensor, weight_DK: Tensor, table_LD: Tensor, patch: int, prefix: int, top: int, left: int
) -> Tensor:
    """Vision tokens (B, V, prefix + patches, D) from raw images in one launch; arguments as ``launch_patch_embed``."""
    B, V = images_BVHWC.shape[:2]
    out = weight_DK.new_empty(B, V, *table_LD.shape)
    with torch.cuda.device_of(out):
        launch_patch_embed(images_BVHWC, weight_DK, table_LD, out, patch=patch, prefix=prefix, crop=(top, left))
    return out


@patch_embed.register_kernel("cpu")
def _(
    images_BVHWC: Tensor, weight_DK: Tensor, table_LD: Tensor, patch: int, prefix: int, top: int, left: int
) -> Tensor:
    dtype, patches = weight_DK.dtype, table_LD.shape[0] - prefix
    side = patch * _grid_side(patches)
    B, V = images_BVHWC.shape[:2]
    crop = images_BVHWC[:, :, top : top + side, left : left + side].to(dtype) - PIXEL_CENTRE
    grid = crop.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).transpose(3, 4)  # B V gridH gridW P P 3
    features = grid.reshape(B, V, patches, 3 * patch * patch)
    tokens = F.linear(features, weight_DK[:, : features.shape[-1]]) + table_LD[prefix:].to(dtype)
    return torch.cat([table_LD[:prefix].to(dtype).expand(B, V, -1, -1), tokens], 2)


@patch_embed.register_fake
def _(
    images_BVHWC: Tensor, weight_DK: Tensor, table_LD: Tensor, patch: int, prefix: int, top: int, left: int
) -> Tensor:
    return weight_DK.new_empty(*images_BVHWC.shape[:2], *table_LD.shape)


# ---------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------


# fp32 is for checking, as in ``gemm``.
_FP32 = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 8, "num_warps": 4, "num_stages": 2}


def _without_split(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "SPLIT_K"}


CONFIGS: configs.ConfigTable = {
    arch: [
        ({"dtype": "fp32"}, _FP32),
        *((conditions, _without_split(config)) for conditions, config in configs.rules(rows)),
    ]
    for arch, rows in tables.PATCH_EMBED.items()
}
