"""Inside the attention kernels: one head's columns in and out of memory."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from vat_fast.kernels.attention_tiles import MIN_TILE

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))
MMA_ROWS = tl.constexpr(MIN_TILE)


@triton.jit
def load_columns(
    rows_ptr,  # [ROWS] pointers to the first column of one head in each row
    rows_valid,  # [ROWS] bool, read only if MASK_ROWS
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """Columns FIRST .. FIRST + WIDTH of one head; columns past HEAD_DIM and invalid rows read as zero."""
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = rows_ptr[:, None] + cols[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        mask = (cols < HEAD_DIM)[None, :]
        if MASK_ROWS:
            mask = mask & rows_valid[:, None]
        tile = tl.load(ptrs, mask=mask, other=0.0)
    elif MASK_ROWS:
        tile = tl.load(ptrs, mask=rows_valid[:, None], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_columns(
    rows_ptr,
    tile,
    rows_valid,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """The mirror of `load_columns`: one cast to the stored type, nothing past HEAD_DIM or in an invalid row."""
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = rows_ptr[:, None] + cols[None, :]
    tile = tile.to(ptrs.dtype.element_ty)
    if FIRST + WIDTH > HEAD_DIM:
        mask = (cols < HEAD_DIM)[None, :]
        if MASK_ROWS:
            mask = mask & rows_valid[:, None]
        tl.store(ptrs, tile, mask=mask)
    elif MASK_ROWS:
        tl.store(ptrs, tile, mask=rows_valid[:, None])
    else:
        tl.store(ptrs, tile)


@triton.jit
def load_head(
    row_ptr,  # the first column of one head in one row
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Columns FIRST .. FIRST + WIDTH of one row in fp32; columns past HEAD_DIM read as zero."""
    cols = FIRST + tl.arange(0, WIDTH)
    return tl.load(row_ptr + cols, mask=cols < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def store_head(row_ptr, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The mirror of `load_head`."""
    cols = FIRST + tl.arange(0, WIDTH)
    tl.store(row_ptr + cols, values.to(row_ptr.dtype.element_ty), mask=cols < HEAD_DIM)
