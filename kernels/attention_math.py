"""Multi-head attention in plain PyTorch, forward and backward: the maths that the kernels follow.

Softmax with its log-sum-exp kept, blockwise: Dao et al., FlashAttention, arXiv 2205.14135, and FlashAttention-2, arXiv
2307.08691. With S = scale * Q K^T, P = softmax(S), O = P V and lse = log sum exp S, the backward is

    delta = rowsum(dO * O)      P = exp(S - lse)      dV = P^T dO
    dP = dO V^T                 dS = P * (dP - delta) dQ = scale * dS K      dK = scale * dS^T Q
"""

from __future__ import annotations

import torch


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
