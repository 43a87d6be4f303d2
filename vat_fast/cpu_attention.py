"""Attention for bf16 training on CPUs, as matrix products over the heads, from packed projections to packed gradients.

PyTorch's fused attention has a backward for CPUs that takes four times as long in bfloat16 as its five products.
Written with autograd's operators these cost as much again in copies: of query, key and value one by one, and of their
gradients when `permute` and `unbind` are undone. Here each packed tensor is copied once, heads first, and its gradient
once back.

    P = softmax(s Q K^T), O = P V;   dV = P^T dO, dP = dO V^T, dS = P * (dP - sum(dP * P)), dQ = s dS K, dK = s dS^T Q
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def serves(x: Tensor) -> bool:
    """Whether attention over this projection should come from here: bf16 on a CPU, and a backward to follow."""
    return x.requires_grad and x.dtype == torch.bfloat16 and x.device.type == "cpu"


def vision_attention(qkv_NP3D: Tensor, num_heads: int, scale: float) -> Tensor:
    """As `TorchOps.vision_attention`; gradients of the first order."""
    out: Tensor = _SelfAttention.apply(qkv_NP3D, num_heads, scale)
    return out


def cross_attention(
    q_BTD: Tensor, kv_vision_BS2D: Tensor, num_heads: int, scale: float, kv_extra_BE2D: Tensor | None
) -> Tensor:
    """As `TorchOps.cross_attention` without its map; gradients of the first order."""
    out: Tensor = _CrossAttention.apply(q_BTD, kv_vision_BS2D, kv_extra_BE2D, num_heads, scale)
    return out


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_NP3D: Tensor, num_heads: int, scale: float) -> Tensor:
        qkv = _heads_first(qkv_NP3D, 3, num_heads)
        q, k, v = qkv.unbind()
        out, weights = _forward(q, k, v, scale)
        ctx.save_for_backward(qkv, weights)
        ctx.num_heads, ctx.scale = num_heads, scale
        return _tokens_first(out[None], num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NPD: Tensor) -> tuple[Tensor | None, ...]:
        qkv, weights = ctx.saved_tensors
        grads = torch.empty_like(qkv)
        _backward(_heads_first(grad_NPD, 1, ctx.num_heads)[0], qkv.unbind(), weights, ctx.scale, grads.unbind())
        return _tokens_first(grads, ctx.num_heads), None, None


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BTD: Tensor, kv_BS2D: Tensor, extra_BE2D: Tensor | None, num_heads: int, scale: float
    ) -> Tensor:
        q = _heads_first(q_BTD, 1, num_heads)[0]
        ctx.num_extra = 0 if extra_BE2D is None else extra_BE2D.shape[1]
        kv = _heads_first(kv_BS2D if extra_BE2D is None else torch.cat([extra_BE2D, kv_BS2D], dim=1), 2, num_heads)
        k, v = kv.unbind()
        out, weights = _forward(q, k, v, scale)
        ctx.save_for_backward(q, kv, weights)
        ctx.num_heads, ctx.scale = num_heads, scale
        return _tokens_first(out[None], num_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, weights = ctx.saved_tensors
        grad_q, grad_kv = torch.empty_like(q), torch.empty_like(kv)
        grad = _heads_first(grad_BTD, 1, ctx.num_heads)[0]
        _backward(grad, (q, *kv.unbind()), weights, ctx.scale, (grad_q, *grad_kv.unbind()))
        packed, E = _tokens_first(grad_kv, ctx.num_heads), ctx.num_extra
        extra = packed[:, :E] if E else None
        return _tokens_first(grad_q[None], ctx.num_heads), packed[:, E:], extra, None, None


def _heads_first(packed: Tensor, parts: int, num_heads: int) -> Tensor:
    """(B, S, parts * D) -> (parts, B * H, S, d), contiguous."""
    B, S, width = packed.shape
    heads = packed.reshape(B, S, parts, num_heads, width // (parts * num_heads)).permute(2, 0, 3, 1, 4)
    return heads.contiguous().flatten(1, 2)


def _tokens_first(heads: Tensor, num_heads: int) -> Tensor:
    """(parts, B * H, S, d) -> (B, S, parts * D), contiguous."""
    return heads.unflatten(1, (-1, num_heads)).permute(1, 3, 0, 2, 4).flatten(2)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and attention weights, (B * H, T, d) and (B * H, T, S)."""
    weights = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=scale).softmax(-1)
    return torch.bmm(weights, v), weights


def _backward(grad: Tensor, qkv: Sequence[Tensor], weights: Tensor, scale: float, grads: Sequence[Tensor]) -> None:
    """Write the gradients of query, key and value into `grads`, given the output's."""
    (q, k, v), (grad_q, grad_k, grad_v) = qkv, grads
    torch.bmm(weights.transpose(1, 2), grad, out=grad_v)
    grad_weights = torch.bmm(grad, v.transpose(1, 2))
    grad_logits = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
    torch.baddbmm(q.new_empty(1), grad_logits, k, beta=0, alpha=scale, out=grad_q)
    torch.baddbmm(q.new_empty(1), grad_logits.transpose(1, 2), q, beta=0, alpha=scale, out=grad_k)
