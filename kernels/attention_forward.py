"""Attention forward: the kernel that vision self-attention and action cross-attention share, and its launcher.

One program has a tile of queries of one head and walks over the keys, or over its split of them, with an online softmax
(`attention_math`). The few extra tokens' keys are taken one by one on the ordinary cores: an MMA would multiply sixteen
for one.
"""

# ruff: noqa: SIM102  (an `if` on a constexpr around one on a run-time value: merged, the dead branch would compile)

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vat_fast.kernels import configs
from vat_fast.kernels.attention_heads import LN2, LOG2E, MMA_ROWS, load_columns, load_head, store_columns
from vat_fast.kernels.attention_tiles import (
    dot_precision,
    query_tails,
    query_tiles,
    split_head_dim,
    tail_tile,
    warps_of_rows,
)


@triton.jit
def _dot(a, b, acc, SWAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b + acc; SWAPPED as (b^T @ a^T + acc^T)^T, the same with a's rows for columns."""
    if SWAPPED:
        acc = tl.trans(tl.dot(tl.trans(b), tl.trans(a), tl.trans(acc), input_precision=PRECISION))
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _attend_tile(
    q_main,  # [M, MAIN]
    q_tail,  # [M, TAIL], unused if TAIL == 0
    k_ptr,  # keys and values of one head: first column of row 0
    v_ptr,
    first_key,
    row_max,  # [M] running maximum of scale * log2(e) * S
    row_sum,  # [M] running sum of 2 ** (S' - row_max)
    acc_main,  # [M, MAIN] running P V
    acc_tail,  # [M, OUT_TAIL]
    scale_log2,
    NUM_ROWS: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    WIDTH: tl.constexpr,  # keys in this tile
    MASK: tl.constexpr,
    SWAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax over WIDTH keys."""
    keys = first_key + tl.arange(0, WIDTH)
    valid = keys < NUM_ROWS
    k_rows = k_ptr + keys * ROW_STRIDE
    v_rows = v_ptr + keys * ROW_STRIDE

    k_main = load_columns(k_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    scores = tl.zeros([q_main.shape[0], WIDTH], tl.float32)
    scores = _dot(q_main, tl.trans(k_main), scores, SWAPPED, PRECISION)
    if TAIL > 0:
        k_tail = load_columns(k_rows, valid, MAIN, TAIL, HEAD_DIM, MASK)
        scores = _dot(q_tail, tl.trans(k_tail), scores, SWAPPED, PRECISION)
    if MASK:
        scores = tl.where(valid[None, :], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)

    v_main = load_columns(v_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    p = p.to(v_main.dtype)
    acc_main = _dot(p, v_main, acc_main * rescale[:, None], SWAPPED, PRECISION)
    if TAIL > 0:
        v_tail = load_columns(v_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
        acc_tail = _dot(p, v_tail, acc_tail * rescale[:, None], SWAPPED, PRECISION)
    return new_max, row_sum, acc_main, acc_tail


@triton.jit
def _attend_key(
    q_main,
    q_tail,
    k_row,  # key and value of one token: first column of one head
    v_row,
    row_max,
    row_sum,
    acc_main,
    acc_tail,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    OUT_TAIL: tl.constexpr,
):
    """One step of the online softmax over a single key, on the ordinary cores."""
    scores = tl.sum(q_main.to(tl.float32) * load_head(k_row, 0, MAIN, HEAD_DIM)[None, :], 1)
    if TAIL > 0:
        scores += tl.sum(q_tail.to(tl.float32) * load_head(k_row, MAIN, TAIL, HEAD_DIM)[None, :], 1)
    new_max = tl.maximum(row_max, scores * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_max)
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + p
    acc_main = acc_main * rescale[:, None] + p[:, None] * load_head(v_row, 0, MAIN, HEAD_DIM)[None, :]
    if TAIL > 0:
        acc_tail = acc_tail * rescale[:, None] + p[:, None] * load_head(v_row, MAIN, OUT_TAIL, HEAD_DIM)[None, :]
    return new_max, row_sum, acc_main, acc_tail


@triton.jit
def _combine_splits(
    partial_ptr,  # [SPLITS, NUM_QUERIES, HEAD_DIM] of one head, each split normalised by its own sum
    partial_lse_ptr,  # [SPLITS, NUM_QUERIES], in powers of two
    queries,
    valid,
    NUM_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    SPLITS: tl.constexpr,
    M: tl.constexpr,
):
    """Weighted mean of the splits' outputs, always in split order: the result does not depend on who came last.

    The loads bypass the first-level cache (.cg): other programs wrote these lines.
    """
    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc_main = tl.zeros([M, MAIN], tl.float32)
    acc_tail = tl.zeros([M, OUT_TAIL], tl.float32)
    main_cols = tl.arange(0, MAIN)
    tail_cols = MAIN + tl.arange(0, OUT_TAIL)
    for split in tl.static_range(SPLITS):  # unrolled: the splits' loads overlap
        rows = split * NUM_QUERIES + queries
        lse = tl.load(partial_lse_ptr + rows, mask=valid, other=0.0, cache_modifier=".cg")
        ptrs = partial_ptr + rows[:, None] * HEAD_DIM
        main_mask = valid[:, None] & (main_cols < HEAD_DIM)[None, :]
        main = tl.load(ptrs + main_cols[None, :], mask=main_mask, other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, lse)
        weight = tl.exp2(lse - new_max)
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + weight
        acc_main = acc_main * rescale[:, None] + main * weight[:, None]
        if HEAD_DIM > MAIN:
            tail_mask = valid[:, None] & (tail_cols < HEAD_DIM)[None, :]
            tail = tl.load(ptrs + tail_cols[None, :], mask=tail_mask, other=0.0, cache_modifier=".cg")
            acc_tail = acc_tail * rescale[:, None] + tail * weight[:, None]
        row_max = new_max
    return row_max, row_sum, acc_main, acc_tail


@triton.jit
def _attend_query_tile(
    q_ptr,  # all pointers: first column of this head in row 0 of this batch element
    k_ptr,
    v_ptr,
    k_extra_ptr,
    v_extra_ptr,
    out_ptr,
    lse_ptr,
    partial_ptr,
    partial_lse_ptr,
    counter_ptr,
    first_query,
    split,
    scale_log2,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    EXTRA_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    NARROW_TAIL: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    SPLITS: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    MASK: tl.constexpr,
):
    """M queries of one head against this split's keys; the last split to arrive writes the result."""
    SWAPPED: tl.constexpr = M < MMA_ROWS * WARPS
    # Where queries are columns, the output's columns are rows.
    OUT_TAIL: tl.constexpr = TAIL if SWAPPED and TAIL > 0 else NARROW_TAIL
    queries = first_query + tl.arange(0, M)
    valid = queries < NUM_QUERIES
    q_rows = q_ptr + queries * Q_ROW
    q_main = load_columns(q_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    q_tail = q_main
    if TAIL > 0:
        q_tail = load_columns(q_rows, valid, MAIN, TAIL, HEAD_DIM, MASK)

    row_max = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    acc_main = tl.zeros([M, MAIN], tl.float32)
    acc_tail = tl.zeros([M, OUT_TAIL], tl.float32)

    FULL: tl.constexpr = NUM_KEYS // BLOCK_N
    first_tile = split * FULL // SPLITS
    last_tile = (split + 1) * FULL // SPLITS
    for tile in range(first_tile, last_tile):
        row_max, row_sum, acc_main, acc_tail = _attend_tile(
            q_main, q_tail, k_ptr, v_ptr, tile * BLOCK_N, row_max, row_sum, acc_main, acc_tail, scale_log2,
            NUM_KEYS, KV_ROW, HEAD_DIM, MAIN, TAIL, OUT_TAIL, BLOCK_N, False, SWAPPED, PRECISION,
        )  # fmt: skip
    # The ragged end and the extra tokens' keys go to the last split. The order of keys does not matter to a softmax.
    if split == SPLITS - 1:
        if KEY_TAIL > 0:
            row_max, row_sum, acc_main, acc_tail = _attend_tile(
                q_main, q_tail, k_ptr, v_ptr, FULL * BLOCK_N, row_max, row_sum, acc_main, acc_tail, scale_log2,
                NUM_KEYS, KV_ROW, HEAD_DIM, MAIN, TAIL, OUT_TAIL, KEY_TAIL, True, SWAPPED, PRECISION,
            )  # fmt: skip
        for extra in tl.static_range(NUM_EXTRA):
            row_max, row_sum, acc_main, acc_tail = _attend_key(
                q_main, q_tail, k_extra_ptr + extra * EXTRA_ROW, v_extra_ptr + extra * EXTRA_ROW, row_max, row_sum,
                acc_main, acc_tail, scale_log2, HEAD_DIM, MAIN, TAIL, OUT_TAIL,
            )  # fmt: skip

    if SPLITS == 1:
        out_rows = out_ptr + queries * OUT_ROW
        store_columns(out_rows, acc_main / row_sum[:, None], valid, 0, MAIN, HEAD_DIM, MASK)
        if TAIL > 0:
            store_columns(out_rows, acc_tail / row_sum[:, None], valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
        tl.store(lse_ptr + queries, (row_max + tl.log2(row_sum)) * LN2, mask=valid)
    else:
        rows = split * NUM_QUERIES + queries
        partial_rows = partial_ptr + rows * HEAD_DIM
        store_columns(partial_rows, acc_main / row_sum[:, None], valid, 0, MAIN, HEAD_DIM, MASK)
        if TAIL > 0:
            store_columns(partial_rows, acc_tail / row_sum[:, None], valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
        tl.store(partial_lse_ptr + rows, row_max + tl.log2(row_sum), mask=valid)
        # The barrier orders this block's stores before the one thread that does the atomic; release publishes them
        # to the device, acquire makes the other splits' stores visible to whoever arrives last.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            row_max, row_sum, acc_main, acc_tail = _combine_splits(
                partial_ptr, partial_lse_ptr, queries, valid,
                NUM_QUERIES, HEAD_DIM, MAIN, OUT_TAIL, SPLITS, M,
            )  # fmt: skip
            out_rows = out_ptr + queries * OUT_ROW
            store_columns(out_rows, acc_main / row_sum[:, None], valid, 0, MAIN, HEAD_DIM, MASK)
            if TAIL > 0:
                store_columns(out_rows, acc_tail / row_sum[:, None], valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
            tl.store(lse_ptr + queries, (row_max + tl.log2(row_sum)) * LN2, mask=valid)
            tl.store(counter_ptr, 0)  # ready for the next launch, or the next replay of a graph


@triton.jit
def _attention_forward_kernel(
    q_ptr,  # (B, NUM_QUERIES, H*HEAD_DIM), rows Q_ROW apart
    k_ptr,  # (B, NUM_KEYS, H*HEAD_DIM), rows KV_ROW apart
    v_ptr,  # as k
    k_extra_ptr,  # (B, NUM_EXTRA, H*HEAD_DIM), rows EXTRA_ROW apart; unused if NUM_EXTRA == 0
    v_extra_ptr,
    out_ptr,  # (B, NUM_QUERIES, H*HEAD_DIM), rows OUT_ROW apart
    lse_ptr,  # (B, H, NUM_QUERIES) fp32
    partial_ptr,  # (B, H, SPLITS, NUM_QUERIES, HEAD_DIM) fp32; unused if SPLITS == 1
    partial_lse_ptr,  # (B, H, SPLITS, NUM_QUERIES) fp32
    counter_ptr,  # (B, H, query tiles) int32, zero before and after
    q_batch,
    kv_batch,
    extra_batch,
    out_batch,
    scale,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    EXTRA_ROW: tl.constexpr,
    OUT_ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUERY_TAIL: tl.constexpr,  # rows of the tile for the queries left over, 0 if there are none
    LAST_TAIL: tl.constexpr,  # of another tile after it, 0 if there is none
    BLOCK_N: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    SPLITS: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (query tiles * SPLITS, H, B). Query tiles vary fastest: neighbours read the same keys from L2."""
    FULL_TILES: tl.constexpr = NUM_QUERIES // BLOCK_M
    NUM_TILES: tl.constexpr = FULL_TILES + (1 if QUERY_TAIL > 0 else 0) + (1 if LAST_TAIL > 0 else 0)
    FULL_ROWS: tl.constexpr = FULL_TILES * BLOCK_M
    tile = tl.program_id(0) % NUM_TILES
    split = tl.program_id(0) // NUM_TILES
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    pair = batch * NUM_HEADS + head

    q_ptr += batch * q_batch + head * HEAD_DIM
    k_ptr += batch * kv_batch + head * HEAD_DIM
    v_ptr += batch * kv_batch + head * HEAD_DIM
    k_extra_ptr += batch * extra_batch + head * HEAD_DIM
    v_extra_ptr += batch * extra_batch + head * HEAD_DIM
    out_ptr += batch * out_batch + head * HEAD_DIM
    lse_ptr += pair * NUM_QUERIES
    partial_ptr += pair * (SPLITS * NUM_QUERIES * HEAD_DIM)
    partial_lse_ptr += pair * (SPLITS * NUM_QUERIES)
    counter_ptr += pair * NUM_TILES + tile
    scale_log2 = scale * LOG2E

    if FULL_TILES > 0:
        if tile < FULL_TILES:
            _attend_query_tile(
                q_ptr, k_ptr, v_ptr, k_extra_ptr, v_extra_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
                counter_ptr, tile * BLOCK_M, split, scale_log2, Q_ROW, KV_ROW, EXTRA_ROW, OUT_ROW, HEAD_DIM, MAIN,
                TAIL, OUT_TAIL, NUM_QUERIES, NUM_KEYS, NUM_EXTRA, BLOCK_N, KEY_TAIL, SPLITS, WARPS, PRECISION, BLOCK_M,
                False,
            )  # fmt: skip
    if QUERY_TAIL > 0:
        if tile == FULL_TILES:
            _attend_query_tile(
                q_ptr, k_ptr, v_ptr, k_extra_ptr, v_extra_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
                counter_ptr, FULL_ROWS, split, scale_log2, Q_ROW, KV_ROW, EXTRA_ROW, OUT_ROW, HEAD_DIM, MAIN, TAIL,
                OUT_TAIL, NUM_QUERIES, NUM_KEYS, NUM_EXTRA, BLOCK_N, KEY_TAIL, SPLITS, WARPS, PRECISION, QUERY_TAIL,
                FULL_ROWS + QUERY_TAIL > NUM_QUERIES,
            )  # fmt: skip
    if LAST_TAIL > 0:
        if tile == FULL_TILES + 1:
            _attend_query_tile(
                q_ptr, k_ptr, v_ptr, k_extra_ptr, v_extra_ptr, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr,
                counter_ptr, FULL_ROWS + QUERY_TAIL, split, scale_log2, Q_ROW, KV_ROW, EXTRA_ROW, OUT_ROW, HEAD_DIM,
                MAIN, TAIL, OUT_TAIL, NUM_QUERIES, NUM_KEYS, NUM_EXTRA, BLOCK_N, KEY_TAIL, SPLITS, WARPS, PRECISION,
                LAST_TAIL, FULL_ROWS + QUERY_TAIL + LAST_TAIL > NUM_QUERIES,
            )  # fmt: skip


@dataclass(frozen=True)
class SplitWorkspace:
    """Scratch of a forward split over keys. Counters are zero between launches; concurrent launches need their own."""

    partial: torch.Tensor  # (B, H, splits, T, head_dim) fp32
    partial_lse: torch.Tensor  # (B, H, splits, T) fp32
    counters: torch.Tensor  # (B, H, query tiles) int32

    @staticmethod
    def make(
        batch: int, num_heads: int, num_queries: int, head_dim: int, splits: int, block_m: int, device: torch.device
    ) -> SplitWorkspace:
        rows = (batch, num_heads, splits, num_queries)
        tiles = query_tiles(num_queries, block_m, configs.current_arch())
        return SplitWorkspace(
            partial=torch.empty(*rows, head_dim, dtype=torch.float32, device=device),
            partial_lse=torch.empty(rows, dtype=torch.float32, device=device),
            counters=torch.zeros(batch, num_heads, tiles, dtype=torch.int32, device=device),
        )


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
    config: Mapping[str, int],
    extra: tuple[torch.Tensor, torch.Tensor] | None = None,
    workspace: SplitWorkspace | None = None,
) -> None:
    """Write out (B, T, D) and lse (B, H, T) of q (B, T, D) against k, v (B, S, D) and the extra k, v (B, E, D).

    k and v share strides, as do the two extra tensors; rows are contiguous, any row stride. `config` holds BLOCK_M,
    BLOCK_N, num_warps and num_stages. A workspace splits the keys over as many programs as its `partial` says.
    """
    batch, num_queries, width = q.shape
    num_keys, head_dim = k.shape[1], width // num_heads
    main, tail, out_tail = split_head_dim(head_dim)
    k_extra, v_extra = (k, v) if extra is None else extra
    num_extra = 0 if extra is None else k_extra.shape[1]
    splits = 1 if workspace is None else workspace.partial.shape[2]
    partial, partial_lse, counters = (
        (lse, lse, lse) if workspace is None else (workspace.partial, workspace.partial_lse, workspace.counters)
    )
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    arch = configs.current_arch()
    query_tail, last_tail = query_tails(num_queries, block_m, arch)
    grid = (query_tiles(num_queries, block_m, arch) * splits, num_heads, batch)
    _attention_forward_kernel[grid](
        q, k, v, k_extra, v_extra, out, lse, partial, partial_lse, counters,
        q.stride(0), k.stride(0), k_extra.stride(0), out.stride(0), scale,
        Q_ROW=q.stride(1), KV_ROW=k.stride(1), EXTRA_ROW=k_extra.stride(1), OUT_ROW=out.stride(1),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, MAIN=main, TAIL=tail, OUT_TAIL=out_tail,
        NUM_QUERIES=num_queries, NUM_KEYS=num_keys, NUM_EXTRA=num_extra,
        BLOCK_M=block_m, QUERY_TAIL=query_tail, LAST_TAIL=last_tail,
        BLOCK_N=block_n, KEY_TAIL=tail_tile(num_keys, block_n),
        SPLITS=splits, WARPS=warps_of_rows(config["num_warps"], arch), PRECISION=dot_precision(q.dtype),
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
