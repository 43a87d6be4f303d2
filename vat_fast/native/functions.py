"""The compiled operators under autograd: float32 on CPUs, gradients of the first order.

    norm_linears    LN(x) W_i^T + b_i for linears that read the same rows
    linear          x W^T + b, onto a residual where there is one
    mlp             x + fc2(gelu(fc1(LN(x))))
    attention       softmax(s Q K^T) V over heads of packed projections

What a backward can compute again from the inputs in the same pass is not kept: normalised rows, GELU's output,
attention weights. Tensors without storage (`FakeTensorMode`) pass through with their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vat_fast.native.calls import Count, call, native
from vat_fast.native.library import load

Weights = Sequence[tuple[Tensor, Tensor]]
"""(weight (N, K), bias (N,)) of linears that read the same rows."""


def norm_linears(
    x_BND: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, linears: Weights
) -> tuple[Tensor, list[Tensor]]:
    """x as it came, to go on with, and each linear of its LayerNorm; (B, N, D) -> (B, N, N_i).

    Going on with the returned x lets both gradients of x be added in one pass.

    Raises:
        ValueError: a weight or bias that does not fit.
    """
    for weight, bias in linears:
        _check_linear(x_BND.shape[-1], weight, bias)
    flat = [tensor for pair in linears for tensor in pair]
    x, *outs = _NormLinears.apply(x_BND.contiguous(), norm_weight, norm_bias, eps, *_dense(flat))
    return x, outs


def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """(..., K) -> (..., N), on top of `residual` (..., N) where given.

    Raises:
        ValueError: a weight, bias or residual that does not fit.
    """
    _check_linear(x.shape[-1], weight, bias)
    if residual is not None and residual.shape != (*x.shape[:-1], len(weight)):
        raise ValueError(f"residual must be {(*x.shape[:-1], len(weight))}, got {tuple(residual.shape)}")
    residual = None if residual is None else residual.contiguous()
    out: Tensor = _Linear.apply(x.contiguous(), *_dense([weight, bias]), residual)
    return out


def mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    fc1: tuple[Tensor, Tensor],
    fc2: tuple[Tensor, Tensor],
) -> Tensor:
    """(..., D) -> (..., D); GELU is the exact one.

    Raises:
        ValueError: weights that do not fit together.
    """
    _check_linear(x.shape[-1], *fc1)
    _check_linear(len(fc1[0]), *fc2)
    if len(fc2[0]) != x.shape[-1]:
        raise ValueError(f"fc2 must give {x.shape[-1]} numbers, its weight is {tuple(fc2[0].shape)}")
    out: Tensor = _MLP.apply(x.contiguous(), norm_weight, norm_bias, eps, *_dense([*fc1, *fc2]))
    return out


def vision_attention(qkv_NP3D: Tensor, num_heads: int, scale: float) -> Tensor:
    """Self-attention within each of N views from a packed q|k|v projection; (N, P, D).

    Raises:
        ValueError: a width that is not 3 x heads x head_dim.
    """
    if qkv_NP3D.shape[-1] % (3 * num_heads):
        raise ValueError(f"a packed projection of width {qkv_NP3D.shape[-1]} is not q, k, v of {num_heads} heads")
    out: Tensor = _SelfAttention.apply(qkv_NP3D.contiguous(), num_heads, scale)
    return out


def cross_attention(q_BTD: Tensor, kv_BS2D: Tensor, num_heads: int, scale: float) -> Tensor:
    """Queries (B, T, D) against packed k|v (B, S, 2D); (B, T, D).

    Raises:
        ValueError: shapes that do not fit.
    """
    (B, _, D), packed = q_BTD.shape, kv_BS2D.shape
    if D % num_heads or packed[0] != B or packed[2] != 2 * D:
        raise ValueError(f"queries {tuple(q_BTD.shape)} of {num_heads} heads do not fit to k|v {tuple(packed)}")
    out: Tensor = _CrossAttention.apply(q_BTD.contiguous(), kv_BS2D.contiguous(), num_heads, scale)
    return out


class _NormLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        statistics = x.new_empty(2, _rows(x))
        weights, biases = flat[::2], flat[1::2]
        outs = [x.new_empty(*x.shape[:-1], len(weight)) for weight in weights]
        _linear_forward(x, norm_weight, norm_bias, eps, statistics, weights, biases, None, outs)
        ctx.save_for_backward(x, norm_weight, norm_bias, statistics, *weights)
        ctx.eps = eps
        return x.view_as(x), *outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, statistics, *weights = ctx.saved_tensors
        needs_x = any(ctx.needs_input_grad[:3])
        # A frozen stream reads x elsewhere, and nothing comes back to add to.
        dx, dnorm = (torch.empty_like(x), x.new_empty(2, x.shape[-1])) if needs_x else (None, None)
        dweights, dbiases = _linear_backward(
            x,
            norm_weight,
            norm_bias,
            ctx.eps,
            statistics,
            weights,
            grads,
            grad_x,
            dx,
            dnorm,
            ctx.needs_input_grad[4::2],
        )
        pairs = [gradient for pair in zip(dweights, dbiases, strict=True) for gradient in pair]
        return dx, *((None, None) if dnorm is None else dnorm), None, *pairs


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
        out = x.new_empty(*x.shape[:-1], len(weight))
        _linear_forward(x, None, None, 0.0, None, [weight], [bias], residual, [out])
        ctx.save_for_backward(x, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        (dweight,), (dbias,) = _linear_backward(
            x, None, None, 0.0, None, [weight], [grad], None, dx, None, ctx.needs_input_grad[1:2]
        )
        return dx, dweight, dbias, grad if ctx.needs_input_grad[3] else None


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        fc1: Tensor,
        bias1: Tensor,
        fc2: Tensor,
        bias2: Tensor,
    ) -> Tensor:
        M, D, F = _rows(x), x.shape[-1], len(fc1)
        kept = any(ctx.needs_input_grad)
        hidden = x.new_empty(load().vat_mlp_kept(native(M), native(F))) if kept else None
        statistics, out = x.new_empty(2, M), torch.empty_like(x)
        mean, inverse_std = statistics
        call(
            "vat_mlp_forward",
            *(x, M, D, F, norm_weight, norm_bias, eps, mean, inverse_std, fc1, bias1, fc2, bias2, hidden, out),
        )
        if kept:
            ctx.save_for_backward(x, norm_weight, norm_bias, statistics, fc1, fc2, hidden)
            ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, statistics, fc1, fc2, hidden = ctx.saved_tensors
        M, D, F = _rows(x), x.shape[-1], len(fc1)
        grad = grad.contiguous()
        dx, dnorm, dbias1, dbias2 = torch.empty_like(x), x.new_empty(2, D), x.new_empty(F), x.new_empty(D)
        wanted = ctx.needs_input_grad[4] or ctx.needs_input_grad[6]
        dfc1, dfc2 = (torch.empty_like(fc1), torch.empty_like(fc2)) if wanted else (None, None)
        (mean, inverse_std), (dweight, dbias) = statistics, dnorm
        call(
            "vat_mlp_backward",
            *(grad, x, M, D, F, norm_weight, norm_bias, ctx.eps, mean, inverse_std, fc1, fc2, hidden),
            *(dx, dweight, dbias, dfc1, dbias1, dfc2, dbias2),
        )
        return dx, dweight, dbias, None, dfc1, dbias1, dfc2, dbias2


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_NP3D: Tensor, num_heads: int, scale: float) -> Tensor:
        q, k, v = qkv_NP3D.chunk(3, dim=-1)
        out, log_sum = _attention_forward(q, k, v, num_heads, scale)
        ctx.save_for_backward(qkv_NP3D, out, log_sum)
        ctx.num_heads, ctx.scale = num_heads, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, log_sum = ctx.saved_tensors
        dqkv = torch.empty_like(qkv)
        _attention_backward(grad, out, log_sum, qkv.chunk(3, dim=-1), ctx.num_heads, ctx.scale, dqkv.chunk(3, dim=-1))
        return dqkv, None, None


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTD: Tensor, kv_BS2D: Tensor, num_heads: int, scale: float) -> Tensor:
        k, v = kv_BS2D.chunk(2, dim=-1)
        out, log_sum = _attention_forward(q_BTD, k, v, num_heads, scale)
        ctx.save_for_backward(q_BTD, kv_BS2D, out, log_sum)
        ctx.num_heads, ctx.scale = num_heads, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, log_sum = ctx.saved_tensors
        dq, dkv = torch.empty_like(q), torch.empty_like(kv)
        parts = (q, *kv.chunk(2, dim=-1)), (dq, *dkv.chunk(2, dim=-1))
        _attention_backward(grad, out, log_sum, parts[0], ctx.num_heads, ctx.scale, parts[1])
        return dq, dkv, None, None


def _linear_forward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    statistics: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None,
    outs: Sequence[Tensor],
) -> None:
    mean, inverse_std = (None, None) if statistics is None else statistics
    widths = [len(weight) for weight in weights]
    call(
        "vat_linear_forward",
        *(x, _rows(x), x.shape[-1], norm_weight, norm_bias, eps, mean, inverse_std),
        *(Count(len(weights)), list(weights), list(biases), widths, residual, list(outs)),
    )


def _linear_backward(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    statistics: Tensor | None,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    grad_x: Tensor | None,
    dx: Tensor | None,
    dnorm: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Gradients of weights (None where not `wanted`) and biases; dx and dnorm are written where given."""
    mean, inverse_std = (None, None) if statistics is None else statistics
    dnorm_weight, dnorm_bias = (None, None) if dnorm is None else dnorm
    dweights = [torch.empty_like(w) if need else None for w, need in zip(weights, wanted, strict=True)]
    dbiases = [w.new_empty(len(w)) for w in weights]
    grads = [grad.contiguous() for grad in grads]
    grad_x = None if grad_x is None else grad_x.contiguous()
    call(
        "vat_linear_backward",
        *(x, _rows(x), x.shape[-1], norm_weight, norm_bias, eps, mean, inverse_std),
        *(Count(len(weights)), list(weights), grads, [len(weight) for weight in weights], grad_x, dx),
        *(dweights, dbiases, dnorm_weight, dnorm_bias),
    )
    return dweights, dbiases


def _attention_forward(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output (B, T, D), and (B, H, T) for the backward; k and v have equal strides."""
    (B, T, D), S = q.shape, k.shape[1]
    out, log_sum = q.new_empty(B, T, D), q.new_empty(B, num_heads, T)
    call(
        "vat_attention_forward",
        *(q, *q.stride()[:2], k, v, *k.stride()[:2], B, T, S, num_heads, D // num_heads, scale, out, T * D, D, log_sum),
    )
    return out, log_sum


def _attention_backward(
    grad: Tensor,
    out: Tensor,
    log_sum: Tensor,
    qkv: Sequence[Tensor],
    num_heads: int,
    scale: float,
    grads: Sequence[Tensor],
) -> None:
    (q, k, v), (dq, dk, dv) = qkv, grads
    (B, T, D), S = q.shape, k.shape[1]
    call(
        "vat_attention_backward",
        *(grad.contiguous(), out, log_sum, q, *q.stride()[:2], k, v, *k.stride()[:2]),
        *(B, T, S, num_heads, D // num_heads, scale, dq, *dq.stride()[:2], dk, dv, *dk.stride()[:2]),
    )


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _check_linear(K: int, weight: Tensor, bias: Tensor) -> None:
    """The library reads memory by these shapes, so they must be right."""
    if weight.ndim != 2 or weight.shape[1] != K or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"a linear of {K} inputs needs a weight (N, {K}) and a bias (N,), got {tuple(weight.shape)} and "
            f"{tuple(bias.shape)}"
        )
