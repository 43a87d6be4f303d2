"""Attention backward: the kernels that vision self-attention and action cross-attention share, and their launcher.

One program owns a block of keys and walks over the queries (`attention_math`).
"""

# ruff: noqa: SIM102  (an `if` on a constexpr around one on a run-time value: merged, the dead branch would compile)

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from vat_fast.kernels.attention_heads import LOG2E, load_columns, load_head, store_columns, store_head
from vat_fast.kernels.attention_tiles import dot_precision, num_tiles, split_head_dim, tail_tile


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
    o = load_columns(o_rows, valid, 0, MAIN, HEAD_DIM, True).to(tl.float32)
    g = load_columns(g_rows, valid, 0, MAIN, HEAD_DIM, True).to(tl.float32)
    delta = tl.sum(o * g, 1)
    if HEAD_DIM > MAIN:
        o = load_columns(o_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, True).to(tl.float32)
        g = load_columns(g_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, True).to(tl.float32)
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
    q_main = load_columns(q_rows, valid, 0, MAIN, HEAD_DIM, MASK_QUERIES)

    scores = tl.dot(k_main, tl.trans(q_main), input_precision=PRECISION)
    if TAIL > 0:
        q_tail = load_columns(q_rows, valid, MAIN, TAIL, HEAD_DIM, MASK_QUERIES)
        scores = tl.dot(k_tail, tl.trans(q_tail), scores, input_precision=PRECISION)
    # Rows past the end get lse = inf, hence p = 0.
    lse = tl.load(lse_ptr + queries, mask=valid, other=float("inf")) * LOG2E
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    if MASK_KEYS:
        p = tl.where(keys_valid[:, None], p, 0.0)  # a zero key's 2 ** -lse can overflow

    do_main = load_columns(do_rows, valid, 0, MAIN, HEAD_DIM, MASK_QUERIES)
    weights = p.to(do_main.dtype)
    dv_main = tl.dot(weights, do_main, dv_main, input_precision=PRECISION)
    dp = tl.dot(v_main, tl.trans(do_main), input_precision=PRECISION)
    if TAIL > 0:
        do_tail = load_columns(do_rows, valid, MAIN, TAIL, HEAD_DIM, MASK_QUERIES)
        do_narrow = do_tail
        if OUT_TAIL < TAIL:
            do_narrow = load_columns(do_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK_QUERIES)
        dv_tail = tl.dot(weights, do_narrow, dv_tail, input_precision=PRECISION)
        dp = tl.dot(v_tail, tl.trans(do_tail), dp, input_precision=PRECISION)

    delta = tl.load(delta_ptr + queries, mask=valid, other=0.0)
    ds = (p * (dp - delta[None, :])).to(q_main.dtype)
    dk_main = tl.dot(ds, q_main, dk_main, input_precision=PRECISION)
    if TAIL > 0:
        q_narrow = q_tail
        if OUT_TAIL < TAIL:
            q_narrow = load_columns(q_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK_QUERIES)
        dk_tail = tl.dot(ds, q_narrow, dk_tail, input_precision=PRECISION)

    # The longer side goes on the MMA's rows: four warps have no use for 32 of them.
    dq_rows = dq_ptr + queries * DQ_ROW
    if M < MAIN:
        dq_main = tl.trans(tl.dot(tl.trans(k_main), ds, input_precision=PRECISION))
    else:
        dq_main = tl.dot(tl.trans(ds), k_main, input_precision=PRECISION)
    store_columns(dq_rows, dq_main, valid, 0, MAIN, HEAD_DIM, MASK_QUERIES)
    if TAIL > 0:
        dq_tail = tl.dot(tl.trans(ds), k_narrow, input_precision=PRECISION)
        store_columns(dq_rows, dq_tail, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK_QUERIES)
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
    k_main = load_columns(k_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    v_main = load_columns(v_rows, valid, 0, MAIN, HEAD_DIM, MASK)
    k_tail = k_main
    k_narrow = k_main
    v_tail = v_main
    dk_main = tl.zeros([WIDTH, MAIN], tl.float32)
    dv_main = tl.zeros([WIDTH, MAIN], tl.float32)
    dk_tail = dk_main
    dv_tail = dv_main
    if TAIL > 0:
        k_tail = load_columns(k_rows, valid, MAIN, TAIL, HEAD_DIM, MASK)
        v_tail = load_columns(v_rows, valid, MAIN, TAIL, HEAD_DIM, MASK)
        k_narrow = k_tail
        if OUT_TAIL < TAIL:
            k_narrow = load_columns(k_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
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
    store_columns(dk_rows, dk_main * scale, valid, 0, MAIN, HEAD_DIM, MASK)
    store_columns(dv_rows, dv_main, valid, 0, MAIN, HEAD_DIM, MASK)
    if TAIL > 0:
        store_columns(dk_rows, dk_tail * scale, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)
        store_columns(dv_rows, dv_tail, valid, MAIN, OUT_TAIL, HEAD_DIM, MASK)


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
    k_main, v_main = load_head(k_row, 0, MAIN, HEAD_DIM), load_head(v_row, 0, MAIN, HEAD_DIM)
    k_tail, v_tail = load_head(k_row, MAIN, OUT_TAIL, HEAD_DIM), load_head(v_row, MAIN, OUT_TAIL, HEAD_DIM)
    dk_main, dv_main = tl.zeros([MAIN], tl.float32), tl.zeros([MAIN], tl.float32)
    dk_tail, dv_tail = tl.zeros([OUT_TAIL], tl.float32), tl.zeros([OUT_TAIL], tl.float32)
    for first_query in range(0, NUM_QUERIES, BLOCK_M):
        queries = first_query + tl.arange(0, BLOCK_M)
        valid = queries < NUM_QUERIES
        q_rows = q_ptr + queries * Q_ROW
        do_rows = grad_out_ptr + queries * GRAD_ROW
        q_main = load_columns(q_rows, valid, 0, MAIN, HEAD_DIM, True).to(tl.float32)
        do_main = load_columns(do_rows, valid, 0, MAIN, HEAD_DIM, True).to(tl.float32)
        scores = tl.sum(q_main * k_main[None, :], 1)
        dp = tl.sum(do_main * v_main[None, :], 1)
        if HEAD_DIM > MAIN:
            q_tail = load_columns(q_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, True).to(tl.float32)
            do_tail = load_columns(do_rows, valid, MAIN, OUT_TAIL, HEAD_DIM, True).to(tl.float32)
            scores += tl.sum(q_tail * k_tail[None, :], 1)
            dp += tl.sum(do_tail * v_tail[None, :], 1)
        lse = tl.load(lse_ptr + queries, mask=valid, other=float("inf"))
        p = tl.exp2((scores * scale - lse) * LOG2E)
        ds = p * (dp - tl.load(delta_ptr + queries, mask=valid, other=0.0))
        dk_main += tl.sum(ds[:, None] * q_main, 0)
        dv_main += tl.sum(p[:, None] * do_main, 0)
        dq_rows = dq_ptr + queries * DQ_ROW
        store_columns(dq_rows, ds[:, None] * k_main[None, :], valid, 0, MAIN, HEAD_DIM, True)
        if HEAD_DIM > MAIN:
            dk_tail += tl.sum(ds[:, None] * q_tail, 0)
            dv_tail += tl.sum(p[:, None] * do_tail, 0)
            store_columns(dq_rows, ds[:, None] * k_tail[None, :], valid, MAIN, OUT_TAIL, HEAD_DIM, True)
    store_head(dk_row, dk_main * scale, 0, MAIN, HEAD_DIM)
    store_head(dv_row, dv_main, 0, MAIN, HEAD_DIM)
    if HEAD_DIM > MAIN:
        store_head(dk_row, dk_tail * scale, MAIN, OUT_TAIL, HEAD_DIM)
        store_head(dv_row, dv_tail, MAIN, OUT_TAIL, HEAD_DIM)


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
