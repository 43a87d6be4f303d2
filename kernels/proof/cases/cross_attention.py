"""Production shapes of action cross-attention: the three backbones, rollout (keys split) and training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from vat_fast.kernels import attention_forward, attention_math
from vat_fast.kernels.cross_attention import (
    cross_attention_ref,
    launch_cross_attention,
    launch_cross_attention_backward,
    make_workspace,
)
from vat_fast.kernels.proof.case import Case, Tensors, random, unwritten
from vat_fast.kernels.proof.cases.vision_attention import ROW_SCALARS

EDGE_HEADS = 2
# Whole MMAs are the limit. AMD's are 16 wide both ways, so that 56 tokens take 64 and head dim 72 takes 80 everywhere.
AMD_72 = "its MMAs are 16 wide both ways: 56 or 57 action tokens take 64, and head dim 72 takes 80 in both products"
# NVIDIA's have no waste in the tokens' 8 columns. 48 / 36 in the scores and at best 40 / 36 in the output are 1.22.
WIDTH_36 = "head dim 36 takes 48 in the scores' product and 40 or 48 in the output's"
AMD_36 = "head dim 36 takes 48 in both products, and 56 tokens take 64"
SM_100_TILES = (
    "on sm_100 56 tokens of many samples take a tile of 64: by the static model tiles of 32, 16 and 8 would "
    "take nearly twice as long"
)
# Issued over useful flops, worst target.
MOST_36, MOST_SM_100, MOST_AMD = 1.34, 1.21, {36: 1.53, 72: 1.27}
ROWS_OF_72_BYTES = "a head of 36 columns starts at a multiple of 72 bytes: 8-byte accesses are the widest aligned ones"


def _heads_and_scale(t: Tensors) -> tuple[int, float]:
    heads = t["lse"].shape[1]
    return heads, (t["q"].shape[-1] // heads) ** -0.5


def _forward_inputs(batch: int, queries: int, keys: int, extra: int, heads: int, head_dim: int) -> Tensors:
    """kv is the last 2*D columns of a merged D -> 5*D projection, as in the model."""
    width = heads * head_dim
    tensors = {
        "q": random(batch, queries, width),
        "kv": random(batch, keys, 5 * width, seed=1)[..., 3 * width :],
        "out": unwritten(batch, queries, width),
        "lse": unwritten(batch, heads, queries, dtype=torch.float32),
    }
    return tensors | ({"kv_extra": random(batch, extra, 2 * width, seed=2)} if extra else {})


def _launch_forward(
    t: Tensors, config: Mapping[str, int] | None = None, workspace: attention_forward.SplitWorkspace | None = None
) -> None:
    heads, scale = _heads_and_scale(t)
    if workspace is None:
        workspace = make_workspace(t["q"], t["kv"], heads, config)
    launch_cross_attention(t["q"], t["kv"], heads, scale, t["out"], t["lse"], t.get("kv_extra"), workspace, config)


def _reference_forward(t: Tensors) -> Tensors:
    heads, scale = _heads_and_scale(t)
    kv = torch.cat([t["kv_extra"], t["kv"]], dim=1) if "kv_extra" in t else t["kv"]
    q, k = (attention_math.split_heads(x, heads) for x in (t["q"], kv.chunk(2, dim=-1)[0]))
    lse = torch.logsumexp((q @ k.transpose(-1, -2)).to(attention_math.wide(q.dtype)) * scale, dim=-1)
    out = cross_attention_ref(t["q"], t["kv"], heads, scale, t.get("kv_extra"))
    assert isinstance(out, torch.Tensor)
    return {"out": out, "lse": lse}


def _backward_inputs(batch: int, queries: int, keys: int, extra: int, heads: int, head_dim: int) -> Tensors:
    t = _forward_inputs(batch, queries, keys, extra, heads, head_dim)
    kv = torch.cat([t["kv_extra"], t["kv"]], dim=1) if extra else t["kv"]
    k, v = kv.chunk(2, dim=-1)
    t["out"], t["lse"], _ = attention_math.attention_torch(t["q"], k, v, *_heads_and_scale(t))
    grads = {
        "grad_out": random(*t["q"].shape, seed=3),
        "dq": unwritten(*t["q"].shape),
        "dkv": unwritten(*t["kv"].shape),
    }
    return t | grads | ({"dkv_extra": unwritten(*t["kv_extra"].shape)} if extra else {})


def _launch_backward(t: Tensors, config: Mapping[str, int] | None = None) -> None:
    heads, scale = _heads_and_scale(t)
    launch_cross_attention_backward(
        t["grad_out"], t["q"], t["kv"], t["out"], t["lse"], heads, scale, t["dq"], t["dkv"],
        t.get("kv_extra"), t.get("dkv_extra"), config,
    )  # fmt: skip


def _reference_backward(t: Tensors) -> Tensors:
    names = [name for name in ("q", "kv", "kv_extra") if name in t]
    leaves = {name: t[name].detach().requires_grad_() for name in names}
    heads, scale = _heads_and_scale(t)
    out = cross_attention_ref(leaves["q"], leaves["kv"], heads, scale, leaves.get("kv_extra"))
    assert isinstance(out, torch.Tensor)
    grads = torch.autograd.grad(out, list(leaves.values()), t["grad_out"])
    return {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def _case(
    name: str,
    batch: int,
    queries: int,
    keys: int,
    extra: int,
    head_dim: int,
    edge_keys: int,
    heads: int = 16,
    backward: bool = False,
    extra_flops: str = "",
    most_issued: float = 0.0,
    narrow: str = "",
) -> Case:
    width = heads * head_dim
    make = _backward_inputs if backward else _forward_inputs
    outputs = (("dq", "dkv", "dkv_extra") if extra else ("dq", "dkv")) if backward else ("out", "lse")
    query_rows, key_rows = batch * queries, batch * (keys + extra)
    return Case(
        op="cross_attention_backward" if backward else "cross_attention",
        name=name,
        make=partial(make, batch, queries, keys, extra, heads, head_dim),
        launch=_launch_backward if backward else _launch_forward,
        outputs=outputs,
        useful_flops=(5 if backward else 2) * 2 * batch * heads * queries * (keys + extra) * head_dim,
        useful_bytes=2 * width * (query_rows + key_rows) * (4 if backward else 2) + 4 * heads * query_rows,
        mma=True,
        edge=partial(make, 1, queries, edge_keys, extra, EDGE_HEADS, head_dim),
        reference=_reference_backward if backward else _reference_forward,
        extra_flops=extra_flops,
        most_issued=most_issued,
        extra_flops_amd={36: AMD_36, 72: AMD_72}.get(head_dim, ""),
        most_issued_amd=MOST_AMD.get(head_dim, 0.0),
        narrow=narrow,
        narrow_amd=ROW_SCALARS if backward else "",
    )


CASES = [
    _case("so400m 1 sample", 1, 56, 512, 0, 72, edge_keys=400),
    _case("so400m 16 samples", 16, 56, 512, 0, 72, 128, extra_flops=SM_100_TILES, most_issued=MOST_SM_100),
    _case("so400m 16 samples, 1 extra token", 16, 57, 512, 1, 72, edge_keys=128),
    _case("so400m 3 views, 112 action tokens", 1, 112, 768, 0, 72, edge_keys=192),
    _case("dinov2-large 1 sample, 2 extra tokens", 1, 58, 522, 2, 64, edge_keys=138),
    _case("giantopt 1 sample", 1, 56, 512, 0, 96, edge_keys=192),
    _case("so400m width/2 1 sample", 1, 56, 512, 0, 36, 192, 16, False, WIDTH_36, MOST_36, ROWS_OF_72_BYTES),
    _case("so400m 16 samples, 1 extra token", 16, 57, 512, 1, 72, 128, backward=True),
    _case("dinov2-large 16 samples, 2 extra tokens", 16, 58, 522, 2, 64, 138, backward=True),
    _case("so400m 16 samples", 16, 56, 512, 0, 72, 128, backward=True),
    _case("giantopt 16 samples", 16, 56, 512, 0, 96, 128, backward=True),
]
