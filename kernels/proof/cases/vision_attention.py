"""Production shapes of vision self-attention: the three backbones, two views, rollout and training."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from vat_fast.kernels import attention_math
from vat_fast.kernels.proof.case import Case, Tensors, random, unwritten
from vat_fast.kernels.vision_attention import (
    launch_vision_attention,
    launch_vision_attention_backward,
    vision_attention_ref,
)

EDGE_HEADS = 2
ROW_SCALARS = "64 lanes of a wave each load their own fp32 log-sum-exp and delta beside 16-byte pieces of the tiles"


def _heads_and_scale(t: Tensors) -> tuple[int, float]:
    heads = t["lse"].shape[1]
    return heads, (t["qkv"].shape[-1] // (3 * heads)) ** -0.5


def _forward_inputs(views: int, patches: int, heads: int, head_dim: int) -> Tensors:
    width = heads * head_dim
    return {
        "qkv": random(views, patches, 3 * width),
        "out": unwritten(views, patches, width),
        "lse": unwritten(views, heads, patches, dtype=torch.float32),
    }


def _launch_forward(t: Tensors, config: Mapping[str, int] | None = None) -> None:
    heads, scale = _heads_and_scale(t)
    launch_vision_attention(t["qkv"], heads, scale, t["out"], t["lse"], config)


def _reference_forward(t: Tensors) -> Tensors:
    heads, scale = _heads_and_scale(t)
    q, k, _ = (attention_math.split_heads(x, heads) for x in t["qkv"].chunk(3, dim=-1))
    lse = torch.logsumexp((q @ k.transpose(-1, -2)).to(attention_math.wide(q.dtype)) * scale, dim=-1)
    return {"out": vision_attention_ref(t["qkv"], heads, scale), "lse": lse}


def _backward_inputs(views: int, patches: int, heads: int, head_dim: int) -> Tensors:
    t = _forward_inputs(views, patches, heads, head_dim)
    q, k, v = t["qkv"].chunk(3, dim=-1)
    t["out"], lse, _ = attention_math.attention_torch(q, k, v, *_heads_and_scale(t))
    return t | {"lse": lse, "grad_out": random(*t["out"].shape, seed=1), "dqkv": unwritten(*t["qkv"].shape)}


def _launch_backward(t: Tensors, config: Mapping[str, int] | None = None) -> None:
    heads, scale = _heads_and_scale(t)
    launch_vision_attention_backward(t["grad_out"], t["qkv"], t["out"], t["lse"], heads, scale, t["dqkv"], config)


def _reference_backward(t: Tensors) -> Tensors:
    leaf = t["qkv"].detach().requires_grad_()
    out = vision_attention_ref(leaf, *_heads_and_scale(t))
    return {"dqkv": torch.autograd.grad(out, leaf, t["grad_out"])[0]}


def _cases(
    backbone: str, views: int, training_views: int, patches: int, heads: int, head_dim: int, edge_patches: int
) -> list[Case]:
    width = heads * head_dim

    def products(count: int, views: int) -> int:
        return count * 2 * views * heads * patches * patches * head_dim

    def forward(name: str, views: int) -> Case:
        return Case(
            op="vision_attention",
            name=f"{backbone} {name}",
            make=partial(_forward_inputs, views, patches, heads, head_dim),
            launch=_launch_forward,
            outputs=("out", "lse"),
            useful_flops=products(2, views),
            useful_bytes=views * patches * (2 * 4 * width + 4 * heads),
            mma=True,
            edge=partial(_forward_inputs, 1, edge_patches, EDGE_HEADS, head_dim),
            reference=_reference_forward,
        )

    return [
        forward(f"{views} views", views),
        forward(f"{training_views} views", training_views),
        Case(
            op="vision_attention_backward",
            name=f"{backbone} {training_views} views",
            make=partial(_backward_inputs, training_views, patches, heads, head_dim),
            launch=_launch_backward,
            outputs=("dqkv",),
            narrow_amd=ROW_SCALARS,
            useful_flops=products(5, training_views),
            useful_bytes=training_views * patches * (2 * 8 * width + 4 * heads),
            mma=True,
            edge=partial(_backward_inputs, 1, edge_patches, EDGE_HEADS, head_dim),
            reference=_reference_backward,
        ),
    ]


CASES = [
    *_cases("so400m", 2, 16, 256, 16, 72, edge_patches=128),
    *_cases("dinov2-large", 2, 16, 261, 16, 64, edge_patches=133),
    *_cases("giantopt", 2, 16, 256, 16, 96, edge_patches=128),
]
