"""What vision self-attention and action cross-attention share: tiles, kernels, launchers, plain maths.

Maths (softmax with log-sum-exp saved, blockwise): Dao et al., FlashAttention, arXiv 2205.14135, and FlashAttention-2,
arXiv 2307.08691. With S = scale * Q K^T, P = softmax(S), O = P V and lse = log sum exp S, the backward is

    delta = rowsum(dO * O)      P = exp(S - lse)      dV = P^T dO
    dP = dO V^T                 dS = P * (dP - delta) dQ = scale * dS K      dK = scale * dS^T Q

Head dims that are no power of two are split, not padded: 72 is a 64-wide main part and a narrow tail, 96 is 64 + 32.
The sizes that a model fixes (tokens, heads, head dim, row strides) are compile-time constants: loads are then 16 bytes
wide, and rows are masked in ragged tiles alone. A ragged edge gets tiles of its own size, so that 261 keys cost
256 + 16 and not 320, and 56 queries in tiles of 32 cost 32 + 16 + 8. A warp multiplies 16 rows at least: queries too
few for all warps are the products' columns, of which 8 are enough, and keys or head columns are the rows.
The few extra tokens' keys are taken one by one on the ordinary cores: an MMA would multiply sixteen for one.
"""

# ruff: noqa: SIM102  (an `if` on a constexpr around one on a run-time value: merged, the dead branch would compile)

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vat_fast.kernels import configs

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))

# An MMA wants at least 16 rows and, in 16-bit types, 16 steps along the contraction; the output may be 8 wide.
MIN_TILE = 16
MIN_OUTPUT_TILE = 8
MMA_ROWS = tl.constexpr(MIN_TILE)


# --- plain PyTorch -----------------------------------------------------------------------------------------------


def split_heads(x_BND: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(B, N, H*d) -> (B, H, N, d), a view."""
    return x_BND.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x_BHNd: torch.Tensor) -> torch.Tensor:
    """(B, H, N, d) -> (B, N, H*d), contiguous."""
    return x_BHNd.transpose(1, 2).flatten(2)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float32, or float64 where that is the input's."""
    return torch.promote_types(dtype, torch.float32)


def attention_torch(
    q_BTD: torch.Tensor, k_BSD: torch.Tensor, v_BSD: torch.Tensor, num_heads: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multi-head attention with torch ops, sums in float32 or wider; the maths the kernels follow.

    Returns out (B, T, D) in q's dtype, lse (B, H, T) and the map (B, H, T, S), both in the wide dtype.
    """
    q, k, v = (split_heads(x, num_heads).to(wide(x.dtype)) for x in (q_BTD, k_BSD, v_BSD))
    scores = q @ k.transpose(-1, -2) * scale
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse[..., None])
    return merge_heads(weights @ v).to(q_BTD.dtype), lse, weights


def attention_backward_torch(
    grad_out: torch.Tensor,
    q_BTD: torch.Tensor,
    k_BSD: torch.Tensor,
    v_BSD: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    num_heads: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv) of `attention_torch` from its saved output and log-sum-exp, in the inputs' dtypes."""
    q, k, v, o, do = (split_heads(x, num_heads).to(wide(x.dtype)) for x in (q_BTD, k_BSD, v_BSD, out, grad_out))
    weights = torch.exp(q @ k.transpose(-1, -2) * scale - lse[..., None])
    delta = (do * o).sum(dim=-1, keepdim=True)
    ds = weights * (do @ v.transpose(-1, -2) - delta)
    dq, dk, dv = scale * (ds @ k), scale * (ds.transpose(-1, -2) @ q), weights.transpose(-1, -2) @ do
    return merge_heads(dq).to(q_BTD.dtype), merge_heads(dk).to(k_BSD.dtype), merge_heads(dv).to(v_BSD.dtype)


# --- kernels -----------------------------------------------------------------------------------------------------


@triton.jit
def _load_columns(
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
def _store_columns(
    rows_ptr,
    tile,
    rows_valid,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):
    """The mirror of `_load_columns`: one cast to the stored type, nothing past HEAD_DIM or in an invalid row."""
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

    k_main = _load_columns(k_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    scores = tl.zeros([q_main.shape[0], WIDTH], tl.float32)
    scores = _dot(q_main, tl.trans(k_main), scores, SWAPPED, PRECISION)
    if TAIL > 0:
        k_tail = _load_columns(k_rows, valid, MAIN, TAIL, HEAD_DIM, MASK)
        scores = _dot(q_tail, tl.trans(k_tail), scores, SWAPPED, PRECISION)
    if MASK:
        scores = tl.where(valid[None, :], scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)

    v_main = _load_columns(v_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    p = p.to(v_main.dtype)
    acc_main = _dot(p, v_main, acc_main * rescale[:, None], SWAPPED, PRECISION)
    if TAIL > 0:
        v_tail = _load_columns(v_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
        acc_tail = _dot(p, v_tail, acc_tail * rescale[:, None], SWAPPED, PRECISION)
    return new_max, row_sum, acc_main, acc_tail


@triton.jit
def _load_head(
    row_ptr,  # the first column of one head in one row
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Columns FIRST .. FIRST + WIDTH of one row in fp32; columns past HEAD_DIM read as zero."""
    cols = FIRST + tl.arange(0, WIDTH)
    return tl.load(row_ptr + cols, mask=cols < HEAD_DIM, other=0.0).to(tl.float32)


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
    scores = tl.sum(q_main.to(tl.float32) * _load_head(k_row, 0, MAIN, HEAD_DIM)[None, :], 1)
    if TAIL > 0:
        scores += tl.sum(q_tail.to(tl.float32) * _load_head(k_row, MAIN, TAIL, HEAD_DIM)[None, :], 1)
    new_max = tl.maximum(row_max, scores * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_max)
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + p
    acc_main = acc_main * rescale[:, None] + p[:, None] * _load_head(v_row, 0, MAIN, HEAD_DIM)[None, :]
    if TAIL > 0:
        acc_tail = acc_tail * rescale[:, None] + p[:, None] * _load_head(v_row, MAIN, OUT_TAIL, HEAD_DIM)[None, :]
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
    q_main = _load_columns(q_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    q_tail = q_main
    if TAIL > 0:
        q_tail = _load_columns(q_rows, valid, MAIN, TAIL, HEAD_DIM, MASK)

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
        _store_columns(out_rows, acc_main / row_sum[:, None], valid, 0, MAIN, HEAD_DIM, MASK)
        if TAIL > 0:
            _store_columns(out_rows, acc_tail / row_sum[:, None], valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
        tl.store(lse_ptr + queries, (row_max + tl.log2(row_sum)) * LN2, mask=valid)
    else:
        rows = split * NUM_QUERIES + queries
        partial_rows = partial_ptr + rows * HEAD_DIM
        _store_columns(partial_rows, acc_main / row_sum[:, None], valid, 0, MAIN, HEAD_DIM, MASK)
        if TAIL > 0:
            _store_columns(partial_rows, acc_tail / row_sum[:, None], valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
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
            _store_columns(out_rows, acc_main / row_sum[:, None], valid, 0, MAIN, HEAD_DIM, MASK)
            if TAIL > 0:
                _store_columns(out_rows, acc_tail / row_sum[:, None], valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
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


@triton.jit
def _attention_delta_kernel(
    out_ptr,  # (B, NUM_QUERIES, H*HEAD_DIM)
    grad_out_ptr,  # as out
    delta_ptr,  # (B, H, NUM_QUERIES) fp32
    out_batch,
    grad_batch,
    OUT_ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """delta = rowsum(dO * O). Grid: (query tiles, H, B)."""
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = queries < NUM_QUERIES
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    o_rows = out_ptr + batch * out_batch + head * HEAD_DIM + queries * OUT_ROW
    g_rows = grad_out_ptr + batch * grad_batch + head * HEAD_DIM + queries * GRAD_ROW
    o = _load_columns(o_rows, valid, 0, MAIN, HEAD_DIM, True).to(tl.float32)
    g = _load_columns(g_rows, valid, 0, MAIN, HEAD_DIM, True).to(tl.float32)
    delta = tl.sum(o * g, 1)
    if HEAD_DIM > MAIN:
        o = _load_columns(o_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, True).to(tl.float32)
        g = _load_columns(g_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, True).to(tl.float32)
        delta += tl.sum(o * g, 1)
    tl.store(delta_ptr + (batch * NUM_HEADS + head) * NUM_QUERIES + queries, delta, mask=valid)


@triton.jit
def _grad_tile(
    k_main,  # [WIDTH, MAIN]
    k_tail,  # [WIDTH, TAIL], unused if TAIL == 0
    k_narrow,  # [WIDTH, OUT_TAIL], the same columns without the padding of a contraction
    v_main,
    v_tail,
    keys_valid,  # [WIDTH] bool
    dk_main,  # [WIDTH, MAIN] running sums
    dk_tail,  # [WIDTH, OUT_TAIL]
    dv_main,
    dv_tail,
    q_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,  # this key block's share of dq, fp32
    first_query,
    scale_log2,
    Q_ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    DQ_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
    MASK_QUERIES: tl.constexpr,
    MASK_KEYS: tl.constexpr,
):
    """M queries against one key block: adds to dk and dv, writes this block's share of dq. Scores are [keys, M]."""
    queries = first_query + tl.arange(0, M)
    valid = queries < NUM_QUERIES
    q_rows = q_ptr + queries * Q_ROW
    do_rows = grad_out_ptr + queries * GRAD_ROW
    q_main = _load_columns(q_rows, valid, 0, MAIN, HEAD_DIM, MASK_QUERIES)

    scores = tl.dot(k_main, tl.trans(q_main), input_precision=PRECISION)
    if TAIL > 0:
        q_tail = _load_columns(q_rows, valid, MAIN, TAIL, HEAD_DIM, MASK_QUERIES)
        scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=PRECISION)
    # Rows past the end get lse = inf, hence p = 0.
    lse = tl.load(lse_ptr + queries, mask=valid, other=float("inf")) * LOG2E
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    if MASK_KEYS:
        p = tl.where(keys_valid[:, None], p, 0.0)  # a zero key's 2 ** -lse can overflow

    do_main = _load_columns(do_rows, valid, 0, MAIN, HEAD_DIM, MASK_QUERIES)
    weights = p.to(do_main.dtype)
    dv_main = tl.dot(weights, do_main, dv_main, input_precision=PRECISION)
    dp = tl.dot(v_main, tl.trans(do_main), input_precision=PRECISION)
    if TAIL > 0:
        do_tail = _load_columns(do_rows, valid, MAIN, TAIL, HEAD_DIM, MASK_QUERIES)
        do_narrow = do_tail
        if OUT_TAIL < TAIL:
            do_narrow = _load_columns(do_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK_QUERIES)
        dv_tail = tl.dot(weights, do_narrow, dv_tail, input_precision=PRECISION)
        dp = tl.dot(v_tail, tl.trans(do_tail), dp, input_precision=PRECISION)

    delta = tl.load(delta_ptr + queries, mask=valid, other=0.0)
    ds = (p * (dp - delta[None, :])).to(q_main.dtype)
    dk_main = tl.dot(ds, q_main, dk_main, input_precision=PRECISION)
    if TAIL > 0:
        q_narrow = q_tail
        if OUT_TAIL < TAIL:
            q_narrow = _load_columns(q_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK_QUERIES)
        dk_tail = tl.dot(ds, q_narrow, dk_tail, input_precision=PRECISION)

    # The longer side goes on the MMA's rows: four warps have no use for 32 of them.
    dq_rows = dq_ptr + queries * DQ_ROW
    if M < MAIN:
        dq_main = tl.trans(tl.dot(tl.trans(k_main), ds, input_precision=PRECISION))
    else:
        dq_main = tl.dot(tl.trans(ds), k_main, input_precision=PRECISION)
    _store_columns(dq_rows, dq_main, valid, 0, MAIN, HEAD_DIM, MASK_QUERIES)
    if TAIL > 0:
        dq_tail = tl.dot(tl.trans(ds), k_narrow, input_precision=PRECISION)
        _store_columns(dq_rows, dq_tail, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK_QUERIES)
    return dk_main, dk_tail, dv_main, dv_tail


@triton.jit
def _grad_key_block(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    first_key,
    query_tiles,  # trips of the query loop, at run time: unrolled, it would spill registers
    scale,
    NUM_ROWS: tl.constexpr,  # rows of k_ptr
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    DQ_ROW: tl.constexpr,
    DKV_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH: tl.constexpr,
    MASK: tl.constexpr,
):
    """dk and dv of WIDTH keys, and their share of dq."""
    keys = first_key + tl.arange(0, WIDTH)
    valid = keys < NUM_ROWS
    k_rows = k_ptr + keys * KV_ROW
    v_rows = v_ptr + keys * KV_ROW
    k_main = _load_columns(k_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    v_main = _load_columns(v_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    k_tail = k_main
    k_narrow = k_main
    v_tail = v_main
    dk_main = tl.zeros([WIDTH, MAIN], tl.float32)
    dv_main = tl.zeros([WIDTH, MAIN], tl.float32)
    dk_tail = dk_main
    dv_tail = dv_main
    if TAIL > 0:
        k_tail = _load_columns(k_rows, valid, MAIN, TAIL, HEAD_DIM, MASK)
        v_tail = _load_columns(v_rows, valid, MAIN, TAIL, HEAD_DIM, MASK)
        k_narrow = k_tail
        if OUT_TAIL < TAIL:
            k_narrow = _load_columns(k_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
        dk_tail = tl.zeros([WIDTH, OUT_TAIL], tl.float32)
        dv_tail = tl.zeros([WIDTH, OUT_TAIL], tl.float32)

    scale_log2 = scale * LOG2E
    MASK_QUERIES: tl.constexpr = QUERY_TAIL == BLOCK_M  # a tail as wide as the rest runs in the loop
    if NUM_QUERIES >= BLOCK_M or MASK_QUERIES:
        for tile in tl.range(query_tiles, disable_licm=True):
            dk_main, dk_tail, dv_main, dv_tail = _grad_tile(
                k_main, k_tail, k_narrow, v_main, v_tail, valid, dk_main, dk_tail, dv_main, dv_tail, q_ptr,
                grad_out_ptr, lse_ptr, delta_ptr, dq_ptr, tile * BLOCK_M, scale_log2, Q_ROW, GRAD_ROW, DQ_ROW,
                HEAD_DIM, MAIN, TAIL, OUT_TAIL, NUM_QUERIES, PRECISION, BLOCK_M, MASK_QUERIES, MASK,
            )  # fmt: skip
    if QUERY_TAIL > 0 and not MASK_QUERIES:
        dk_main, dk_tail, dv_main, dv_tail = _grad_tile(
            k_main, k_tail, k_narrow, v_main, v_tail, valid, dk_main, dk_tail, dv_main, dv_tail, q_ptr, grad_out_ptr,
            lse_ptr, delta_ptr, dq_ptr, NUM_QUERIES // BLOCK_M * BLOCK_M, scale_log2, Q_ROW, GRAD_ROW, DQ_ROW,
            HEAD_DIM, MAIN, TAIL, OUT_TAIL, NUM_QUERIES, PRECISION, QUERY_TAIL, True, MASK,
        )  # fmt: skip

    dk_rows = dk_ptr + keys * DKV_ROW
    dv_rows = dv_ptr + keys * DKV_ROW
    _store_columns(dk_rows, dk_main * scale, valid, 0, MAIN, HEAD_DIM, MASK)
    _store_columns(dv_rows, dv_main, valid, 0, MAIN, HEAD_DIM, MASK)
    if TAIL > 0:
        _store_columns(dk_rows, dk_tail * scale, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
        _store_columns(dv_rows, dv_tail, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)


@triton.jit
def _store_head(row_ptr, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The mirror of `_load_head`."""
    cols = FIRST + tl.arange(0, WIDTH)
    tl.store(row_ptr + cols, values.to(row_ptr.dtype.element_ty), mask=cols < HEAD_DIM)


@triton.jit
def _grad_key(
    q_ptr,
    k_row,  # key, value and their gradients of one token: first column of one head
    v_row,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    dk_row,
    dv_row,
    scale,
    Q_ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    DQ_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """dk and dv of a single key and its share of dq, on the ordinary cores."""
    k_main, v_main = _load_head(k_row, 0, MAIN, HEAD_DIM), _load_head(v_row, 0, MAIN, HEAD_DIM)
    k_tail, v_tail = _load_head(k_row, MAIN, OUT_TAIL, HEAD_DIM), _load_head(v_row, MAIN, OUT_TAIL, HEAD_DIM)
    dk_main, dv_main = tl.zeros([MAIN], tl.float32), tl.zeros([MAIN], tl.float32)
    dk_tail, dv_tail = tl.zeros([OUT_TAIL], tl.float32), tl.zeros([OUT_TAIL], tl.float32)
    for first_query in range(0, NUM_QUERIES, BLOCK_M):
        queries = first_query + tl.arange(0, BLOCK_M)
        valid = queries < NUM_QUERIES
        q_rows = q_ptr + queries * Q_ROW
        do_rows = grad_out_ptr + queries * GRAD_ROW
        q_main = _load_columns(q_rows, valid, 0, MAIN, HEAD_DIM, True).to(tl.float32)
        do_main = _load_columns(do_rows, valid, 0, MAIN, HEAD_DIM, True).to(tl.float32)
        scores = tl.sum(q_main * k_main[None, :], 1)
        dp = tl.sum(do_main * v_main[None, :], 1)
        if HEAD_DIM > MAIN:
            q_tail = _load_columns(q_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, True).to(tl.float32)
            do_tail = _load_columns(do_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, True).to(tl.float32)
            scores += tl.sum(q_tail * k_tail[None, :], 1)
            dp += tl.sum(do_tail * v_tail[None, :], 1)
        lse = tl.load(lse_ptr + queries, mask=valid, other=float("inf"))
        p = tl.exp2((scores * scale - lse) * LOG2E)
        ds = p * (dp - tl.load(delta_ptr + queries, mask=valid, other=0.0))
        dk_main += tl.sum(ds[:, None] * q_main, 0)
        dv_main += tl.sum(p[:, None] * do_main, 0)
        dq_rows = dq_ptr + queries * DQ_ROW
        _store_columns(dq_rows, ds[:, None] * k_main[None, :], valid, 0, MAIN, HEAD_DIM, True)
        if HEAD_DIM > MAIN:
            dk_tail += tl.sum(ds[:, None] * q_tail, 0)
            dv_tail += tl.sum(p[:, None] * do_tail, 0)
            _store_columns(dq_rows, ds[:, None] * k_tail[None, :], valid, MAIN, OUT_TAIL, HEAD_DIM, True)
    _store_head(dk_row, dk_main * scale, 0, MAIN, HEAD_DIM)
    _store_head(dv_row, dv_main, 0, MAIN, HEAD_DIM)
    if HEAD_DIM > MAIN:
        _store_head(dk_row, dk_tail * scale, MAIN, OUT_TAIL, HEAD_DIM)
        _store_head(dv_row, dv_tail, MAIN, OUT_TAIL, HEAD_DIM)


@triton.jit(do_not_specialize=["query_tiles"])
def _attention_backward_kernel(
    q_ptr,  # (B, NUM_QUERIES, H*HEAD_DIM)
    k_ptr,  # (B, NUM_KEYS, H*HEAD_DIM)
    v_ptr,
    k_extra_ptr,  # (B, NUM_EXTRA, H*HEAD_DIM)
    v_extra_ptr,
    grad_out_ptr,  # (B, NUM_QUERIES, H*HEAD_DIM)
    lse_ptr,  # (B, H, NUM_QUERIES) fp32
    delta_ptr,  # (B, H, NUM_QUERIES) fp32
    dq_partial_ptr,  # (key blocks, B, NUM_QUERIES, H*HEAD_DIM) fp32, contiguous
    dk_ptr,  # as k, rows DKV_ROW apart
    dv_ptr,
    dk_extra_ptr,
    dv_extra_ptr,
    q_batch,
    kv_batch,
    extra_batch,
    grad_batch,
    dkv_batch,
    dextra_batch,
    query_tiles,
    scale,
    Q_ROW: tl.constexpr,
    KV_ROW: tl.constexpr,
    EXTRA_ROW: tl.constexpr,
    GRAD_ROW: tl.constexpr,
    DKV_ROW: tl.constexpr,
    DEXTRA_ROW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    OUT_TAIL: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    NUM_KEYS: tl.constexpr,
    NUM_EXTRA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    QUERY_TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    KEY_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (key blocks, H, B), one key block a program: full blocks, the ragged one, each extra token."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    pair = batch * NUM_HEADS + head
    DQ_ROW: tl.constexpr = NUM_HEADS * HEAD_DIM

    q_ptr += batch * q_batch + head * HEAD_DIM
    k_ptr += batch * kv_batch + head * HEAD_DIM
    v_ptr += batch * kv_batch + head * HEAD_DIM
    grad_out_ptr += batch * grad_batch + head * HEAD_DIM
    dk_ptr += batch * dkv_batch + head * HEAD_DIM
    dv_ptr += batch * dkv_batch + head * HEAD_DIM
    lse_ptr += pair * NUM_QUERIES
    delta_ptr += pair * NUM_QUERIES
    dq_block = block.to(tl.int64) * tl.num_programs(2) + batch
    dq_partial_ptr += dq_block * (NUM_QUERIES * DQ_ROW) + head * HEAD_DIM

    FULL: tl.constexpr = NUM_KEYS // BLOCK_N
    if FULL > 0:
        if block < FULL:
            _grad_key_block(
                q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, dq_partial_ptr, dk_ptr, dv_ptr,
                block * BLOCK_N, query_tiles, scale, NUM_KEYS, Q_ROW, KV_ROW, GRAD_ROW, DQ_ROW, DKV_ROW, HEAD_DIM,
                MAIN, TAIL, OUT_TAIL, NUM_QUERIES, BLOCK_M, QUERY_TAIL, PRECISION, BLOCK_N, False,
            )  # fmt: skip
    if KEY_TAIL > 0:
        if block == FULL:
            _grad_key_block(
                q_ptr, k_ptr, v_ptr, grad_out_ptr, lse_ptr, delta_ptr, dq_partial_ptr, dk_ptr, dv_ptr,
                FULL * BLOCK_N, query_tiles, scale, NUM_KEYS, Q_ROW, KV_ROW, GRAD_ROW, DQ_ROW, DKV_ROW, HEAD_DIM,
                MAIN, TAIL, OUT_TAIL, NUM_QUERIES, BLOCK_M, QUERY_TAIL, PRECISION, KEY_TAIL, True,
            )  # fmt: skip
    if NUM_EXTRA > 0:
        extra = block - FULL - (1 if KEY_TAIL > 0 else 0)
        if extra >= 0:
            k_row = batch * extra_batch + head * HEAD_DIM + extra * EXTRA_ROW
            dk_row = batch * dextra_batch + head * HEAD_DIM + extra * DEXTRA_ROW
            _grad_key(
                q_ptr, k_extra_ptr + k_row, v_extra_ptr + k_row, grad_out_ptr, lse_ptr, delta_ptr, dq_partial_ptr,
                dk_extra_ptr + dk_row, dv_extra_ptr + dk_row, scale, Q_ROW, GRAD_ROW, DQ_ROW, HEAD_DIM, MAIN, OUT_TAIL,
                NUM_QUERIES, BLOCK_M,
            )  # fmt: skip


@triton.jit
def _sum_dq_kernel(
    dq_partial_ptr,  # (PARTS, rows, WIDTH) fp32, rows = B * NUM_QUERIES
    dq_ptr,  # (B, NUM_QUERIES, WIDTH), rows DQ_ROW apart
    num_rows,
    part_stride,  # num_rows * WIDTH
    dq_batch,
    scale,
    DQ_ROW: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """dq = scale * sum of the key blocks' shares, in a fixed order. Grid: (row tiles, column tiles)."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask = (rows < num_rows)[:, None] & (cols < WIDTH)[None, :]
    rows = rows.to(tl.int64)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for part in tl.static_range(PARTS):
        part_ptr = dq_partial_ptr + part * tl.cast(part_stride, tl.int64)
        total += tl.load(part_ptr + rows[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)
    dq_rows = dq_ptr + rows // NUM_QUERIES * dq_batch + rows % NUM_QUERIES * DQ_ROW
    ptrs = dq_rows[:, None] + cols[None, :]
    tl.store(ptrs, (total * scale).to(ptrs.dtype.element_ty), mask=mask)


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

    q_main = _load_columns(q_rows, q_valid, 0, MAIN, HEAD_DIM, True)
    k_main = _load_columns(k_rows, k_valid, 0, MAIN, HEAD_DIM, True)
    scores = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
    if TAIL > 0:
        q_tail = _load_columns(q_rows, q_valid, MAIN, TAIL, HEAD_DIM, True)
        k_tail = _load_columns(k_rows, k_valid, MAIN, TAIL, HEAD_DIM, True)
        scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision=PRECISION)
    lse = tl.load(lse_ptr + pair * NUM_QUERIES + queries, mask=q_valid, other=float("inf"))
    weights = tl.exp2(scores * (scale * LOG2E) - (lse * LOG2E)[:, None])
    ptrs = map_ptr + (pair * NUM_QUERIES + queries)[:, None] * MAP_ROW + (FIRST_COLUMN + keys)[None, :]
    tl.store(ptrs, weights.to(ptrs.dtype.element_ty), mask=q_valid[:, None] & k_valid[None, :])


# --- launchers ---------------------------------------------------------------------------------------------------


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """(main, tail, output tail) widths of one head: 72 -> (64, 16, 8), 96 -> (64, 32, 32), 64 -> (64, 0, 8).

    The tail is a contraction length in Q K^T, where an MMA wants 16, and an output width in P V, where NVIDIA's MMAs
    take 8; AMD's are 16 wide at least.
    """
    main = max(MIN_TILE, 1 << (head_dim.bit_length() - 1))
    rest = triton.next_power_of_2(head_dim - main) if head_dim > main else 0
    return main, max(rest, MIN_TILE) if rest else 0, max(rest, min_output_tile(configs.current_arch()))


def min_output_tile(arch: configs.Arch) -> int:
    """Columns of the narrowest MMA."""
    return MIN_OUTPUT_TILE if isinstance(arch, int) else MIN_TILE


def tail_tile(count: int, block: int) -> int:
    """Width of the tile for the last `count % block` rows: a power of two, at least 16; 0 if nothing is left over."""
    rest = count % block
    return max(MIN_TILE, triton.next_power_of_2(rest)) if rest else 0


def num_tiles(count: int, block: int) -> int:
    """Full tiles and the ragged one."""
    return count // block + (count % block > 0)


def warps_of_rows(num_warps: int, arch: configs.Arch) -> int:
    """Warps that a tile must have 16 queries for if queries are to be a product's rows; else they are its columns.

    AMD's MMAs are as wide as they are high: there queries are always rows.
    """
    return num_warps if isinstance(arch, int) else 1


def query_tails(count: int, block: int, arch: configs.Arch) -> tuple[int, int]:
    """Rows of the one or two tiles for the last `count % block` queries of a forward; 0 where there is none.

    Two where a single power of two would be larger: 24 queries take 16 and 8. NVIDIA's MMAs take 8 of them as columns.
    """
    least = min_output_tile(arch)
    rows = triton.cdiv(count % block, least) * least
    if rows == 0:
        return 0, 0
    whole = triton.next_power_of_2(rows)
    first = whole if whole == rows else whole // 2
    second = triton.next_power_of_2(rows - first) if rows > first else 0
    return (first, second) if first + second < whole else (whole, 0)


def query_tiles(count: int, block: int, arch: configs.Arch) -> int:
    """Tiles of a forward over `count` queries."""
    return count // block + sum(rows > 0 for rows in query_tails(count, block, arch))


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact float32; TF32 would miss the error that float32 users expect."""
    return "ieee" if dtype == torch.float32 else "tf32"


def check_dtype(name: str, x: torch.Tensor) -> None:
    """Raise unless the kernels take x's dtype."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} has dtype {x.dtype}, expected float32, float16 or bfloat16: cast it first.")


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raise unless `x` (B, rows, columns) has contiguous rows and 32-bit offsets within a batch element."""
    if x.stride(-1) != 1:
        raise ValueError(
            f"{name} has stride {x.stride(-1)} along its last axis, expected 1: call .contiguous() on it first."
        )
    if x.shape[1] * x.stride(1) >= 2**31:
        raise ValueError(
            f"{name} spans {x.shape[1] * x.stride(1)} elements in one batch element, expected fewer than 2**31: "
            "use fewer rows or a smaller row stride."
        )


def check_outputs(out: torch.Tensor, lse: torch.Tensor, shape: tuple[int, ...], num_heads: int) -> None:
    """Raise unless out (B, T, D) has contiguous rows and lse is contiguous float32 (B, H, T)."""
    if tuple(out.shape) != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {shape}.")
    check_rows("out", out)
    batch, rows, _ = shape
    if tuple(lse.shape) != (batch, num_heads, rows) or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(
            f"lse has shape {tuple(lse.shape)} and dtype {lse.dtype}, expected contiguous float32 "
            f"{(batch, num_heads, rows)}."
        )


@dataclass(frozen=True)
class SplitWorkspace:
    """Scratch of a forward split over keys. Counters are zero between launches; concurrent launches need their own."""

    partial: torch.Tensor  # (B, H, splits, T, head_dim) fp32
    partial_lse: torch.Tensor  # (B, H, splits, T) fp32
    counters: torch.Tensor  # (B, H, query tiles) int32

    @staticmethod
    def make(
        batch: int, num_heads: int, num_queries: int, head_dim: int, splits: int, block_m: int, device: torch.device
    ) -> "SplitWorkspace":
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


def launch_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    num_heads: int,
    scale: float,
    config: Mapping[str, int],
    extra: tuple[torch.Tensor, torch.Tensor] | None = None,
    dextra: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write dq, dk, dv (and the extra tokens' dk, dv) from the forward's inputs, output and log-sum-exp.

    Three launches: delta; one program per key block and extra token, which owns its dk and dv and writes its share of
    dq to float32 scratch; the sum of the shares. Five matrix products in all, no atomics, and the same bits every time.
    """
    batch, num_queries, width = q.shape
    num_keys, head_dim = k.shape[1], width // num_heads
    main, tail, out_tail = split_head_dim(head_dim)
    k_extra, v_extra = (k, v) if extra is None else extra
    dk_extra, dv_extra = (dk, dv) if dextra is None else dextra
    num_extra = 0 if extra is None else k_extra.shape[1]
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    parts = num_tiles(num_keys, block_n) + num_extra
    query_tail = tail_tile(num_queries, block_m)

    delta = torch.empty_like(lse)
    _attention_delta_kernel[(triton.cdiv(num_queries, 64), num_heads, batch)](
        out, grad_out, delta, out.stride(0), grad_out.stride(0),
        OUT_ROW=out.stride(1), GRAD_ROW=grad_out.stride(1), NUM_HEADS=num_heads, HEAD_DIM=head_dim,
        MAIN=main, OUT_TAIL=out_tail, NUM_QUERIES=num_queries, BLOCK=64, num_warps=4,
    )  # fmt: skip

    dq_partial = torch.empty(parts, batch, num_queries, width, dtype=torch.float32, device=q.device)
    _attention_backward_kernel[(parts, num_heads, batch)](
        q, k, v, k_extra, v_extra, grad_out, lse, delta, dq_partial, dk, dv, dk_extra, dv_extra,
        q.stride(0), k.stride(0), k_extra.stride(0), grad_out.stride(0), dk.stride(0), dk_extra.stride(0),
        num_queries // block_m + (query_tail == block_m), scale,
        Q_ROW=q.stride(1), KV_ROW=k.stride(1), EXTRA_ROW=k_extra.stride(1), GRAD_ROW=grad_out.stride(1),
        DKV_ROW=dk.stride(1), DEXTRA_ROW=dk_extra.stride(1),
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, MAIN=main, TAIL=tail, OUT_TAIL=out_tail,
        NUM_QUERIES=num_queries, NUM_KEYS=num_keys, NUM_EXTRA=num_extra,
        BLOCK_M=block_m, QUERY_TAIL=query_tail,
        BLOCK_N=block_n, KEY_TAIL=tail_tile(num_keys, block_n),
        PRECISION=dot_precision(q.dtype),
        num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip

    rows = batch * num_queries
    _sum_dq_kernel[(triton.cdiv(rows, 16), triton.cdiv(width, 128))](
        dq_partial, dq, rows, rows * width, dq.stride(0), scale,
        DQ_ROW=dq.stride(1), NUM_QUERIES=num_queries, WIDTH=width, PARTS=parts, BLOCK_ROWS=16, BLOCK_COLS=128,
        num_warps=4,
    )  # fmt: skip


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
