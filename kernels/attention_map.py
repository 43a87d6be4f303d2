"""Attention maps: the softmax weights themselves, from the forward's log-sum-exp. For inspection, not for speed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vat_fast.kernels.attention_heads import LOG2E, load_columns
from vat_fast.kernels.attention_tiles import dot_precision, split_head_dim


@triton.jit
def _attention_map_kernel(
    q_ptr,  # (B, NUM_QUERIES, H*HEAD_DIM)
    k_ptr,  # (B, NUM_ROWS, H*HEAD_DIM)
    lse_ptr,  # (B, H, NUM_QUERIES) fp32
    map_ptr,  # (B, H, NUM_QUERIES, MAP_ROW), contiguous
    q_batch,
    k_batch,
    scale,
    FIRST_COLUMN: tl.constexpr,  # where these keys start in a map row
    MAP_ROW: tl.constexpr,
    Q_ROW: tl.constexpr,
    K_ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """softmax weights = exp(S - lse). Grid: (query tiles * key tiles, H, B). For inspection, not for speed."""
    KEY_TILES: tl.constexpr = (NUM_ROWS + BLOCK_N - 1) // BLOCK_N
    queries = tl.program_id(0) // KEY_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.program_id(0) % KEY_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    pair = batch * NUM_HEADS + head
    q_valid = queries < NUM_QUERIES
    k_valid = keys < NUM_ROWS
    q_rows = q_ptr + batch * q_batch + head * HEAD_DIM + queries * Q_ROW
    k_rows = k_ptr + batch * k_batch + head * HEAD_DIM + keys * K_ROW

    q_main = load_columns(q_rows, q_valid, 0, MAIN, HEAD_DIM, True)
    k_main = load_columns(k_rows, k_valid, 0, MAIN, HEAD_DIM, True)
    scores = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
    if TAIL > 0:
        q_tail = load_columns(q_rows, q_valid, MAIN, TAIL, HEAD_DIM, True)
        k_tail = load_columns(k_rows, k_valid, MAIN, TAIL, HEAD_DIM, True)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    lse = tl.load(lse_ptr + pair * NUM_QUERIES + queries, mask=q_valid, other=float("inf"))
    weights = tl.exp2(scores * (scale * LOG2E) - (lse * LOG2E)[:, None])
    ptrs = map_ptr + (pair * NUM_QUERIES + queries)[:, None] * MAP_ROW + (FIRST_COLUMN + keys)[None, :]
    tl.store(ptrs, weights.to(ptrs.dtype.element_ty), mask=q_valid[:, None] & k_valid[None, :])


def launch_map(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    map_BHTS: torch.Tensor,
    first_column: int,
    num_heads: int,
    scale: float,
) -> None:
    """Write the softmax weights of q against k into map columns first_column .. first_column + rows of k."""
    batch, num_queries, width = q.shape
    main, tail, _ = split_head_dim(width // num_heads)
    block_m, block_n = 64, 64
    grid = (triton.cdiv(num_queries, block_m) * triton.cdiv(k.shape[1], block_n), num_heads, batch)
    _attention_map_kernel[grid](
        q, k, lse, map_BHTS, q.stride(0), k.stride(0), scale,
        FIRST_COLUMN=first_column, MAP_ROW=map_BHTS.shape[-1], Q_ROW=q.stride(1), K_ROW=k.stride(1),
        NUM_HEADS=num_heads, HEAD_DIM=width // num_heads, MAIN=main, TAIL=tail,
        NUM_QUERIES=num_queries, NUM_ROWS=k.shape[1], BLOCK_M=block_m, BLOCK_N=block_n,
        PRECISION=dot_precision(q.dtype), num_warps=4,
    )  # fmt: skip
