"""The operators a VAT layer is made of, one class per backend, and the choice between them.

`VAT.backend` says what a model runs: "torch", "triton", or "auto", which is Triton where the tensors are on a CUDA or
ROCm device and PyTorch elsewhere. `choose` says which it is on a given device, and why.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast import cpu_attention
from vat_fast.config import Gelu

Backend = Literal["auto", "torch", "triton"]


class MLPWeights(NamedTuple):
    """What a pre-norm MLP is made of; hidden width F."""

    norm_weight: Tensor
    """(D,)"""
    norm_bias: Tensor
    """(D,)"""
    fc1_weight: Tensor
    """(F, D)"""
    fc1_bias: Tensor
    """(F,)"""
    fc2_weight: Tensor
    """(D, F)"""
    fc2_bias: Tensor
    """(D,)"""


class TorchOps:
    """The operators as PyTorch calls: any device, any dtype, differentiable."""

    name = "torch"

    @staticmethod
    def film_layernorm(
        x_BND: Tensor,
        gamma_BD: Tensor | None,
        beta_BD: Tensor | None,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
    ) -> Tensor:
        """LayerNorm of FiLM-modulated tokens: LN(x * (1 + gamma) + beta). No FiLM where gamma is None."""
        if gamma_BD is not None and beta_BD is not None:
            x_BND = torch.addcmul(beta_BD[:, None], x_BND, gamma_BD[:, None] + 1)
        return F.layer_norm(x_BND, x_BND.shape[-1:], weight_D, bias_D, eps)

    @staticmethod
    def vision_attention(qkv_NP3D: Tensor, num_heads: int, scale: float) -> Tensor:
        """Self-attention within each of N views from a packed q|k|v projection; (N, P, D)."""
        if cpu_attention.serves(qkv_NP3D):
            return cpu_attention.vision_attention(qkv_NP3D, num_heads, scale)
        N, P, width3 = qkv_NP3D.shape
        q, k, v = qkv_NP3D.view(N, P, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).reshape(N, P, width3 // 3)

    @staticmethod
    def cross_attention(
        q_BTD: Tensor,
        kv_vision_BS2D: Tensor,
        num_heads: int,
        scale: float,
        kv_extra_BE2D: Tensor | None = None,
        need_map: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Action queries against packed k|v of the extra tokens (first) and the vision tokens.

        Returns:
            (B, T, D) and, where asked for, the attention map (B, H, T, E + S), else None.
        """
        if not need_map and cpu_attention.serves(q_BTD):
            return cpu_attention.cross_attention(q_BTD, kv_vision_BS2D, num_heads, scale, kv_extra_BE2D), None
        B, T, D = q_BTD.shape
        q = q_BTD.view(B, T, num_heads, -1).transpose(1, 2)
        kv = kv_vision_BS2D if kv_extra_BE2D is None else torch.cat([kv_extra_BE2D, kv_vision_BS2D], dim=1)
        k, v = kv.unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
        if need_map:
            map_BHTS = ((q * scale) @ k.transpose(-1, -2)).softmax(-1)
            return (map_BHTS @ v).transpose(1, 2).reshape(B, T, D), map_BHTS
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).reshape(B, T, D), None

    @classmethod
    def action_mlp(
        cls, x_BND: Tensor, weights: MLPWeights, eps: float, layer_scale_D: Tensor | None = None, gelu: Gelu = "erf"
    ) -> Tensor:
        """`mlp` for the few rows of the action stream, for which a backend may have another kernel."""
        return cls.mlp(x_BND, weights, eps, layer_scale_D, gelu)

    @staticmethod
    def mlp(
        x_BND: Tensor, weights: MLPWeights, eps: float, layer_scale_D: Tensor | None = None, gelu: Gelu = "erf"
    ) -> Tensor:
        """Pre-norm MLP with its residual: x + ls * fc2(gelu(fc1(LN(x)))); GELU exact (erf) or its tanh form."""
        w = weights
        h = F.layer_norm(x_BND, x_BND.shape[-1:], w.norm_weight, w.norm_bias, eps)
        h = F.gelu(F.linear(h, w.fc1_weight, w.fc1_bias), approximate="none" if gelu == "erf" else "tanh")
        h = F.linear(h, w.fc2_weight, w.fc2_bias)
        return x_BND + h if layer_scale_D is None else torch.addcmul(x_BND, h, layer_scale_D)


class TritonOps(TorchOps):
    """The operators as the fused kernels of `vat_fast.kernels`, on CUDA and ROCm devices, differentiable.

    The vision stream's MLP stays with PyTorch's matrix products: at its row counts in training they are hard to beat.
    """

    name = "triton"

    @staticmethod
    def film_layernorm(
        x_BND: Tensor, gamma_BD: Tensor | None, beta_BD: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
    ) -> Tensor:
        """As `TorchOps.film_layernorm`, in one launch."""
        from vat_fast.kernels import film_layernorm

        return film_layernorm(x_BND, gamma_BD, beta_BD, weight_D, bias_D, eps)

    @staticmethod
    def vision_attention(qkv_NP3D: Tensor, num_heads: int, scale: float) -> Tensor:
        """As `TorchOps.vision_attention`, reading the packed projection in place."""
        from vat_fast.kernels import vision_attention

        return vision_attention(qkv_NP3D, num_heads, scale)

    @staticmethod
    def cross_attention(
        q_BTD: Tensor,
        kv_vision_BS2D: Tensor,
        num_heads: int,
        scale: float,
        kv_extra_BE2D: Tensor | None = None,
        need_map: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `TorchOps.cross_attention`, split over keys, without joining extra and vision keys in memory."""
        from vat_fast.kernels import cross_attention

        result = cross_attention(q_BTD, kv_vision_BS2D, num_heads, scale, kv_extra_BE2D, need_map)
        return result if isinstance(result, tuple) else (result, None)

    @classmethod
    def action_mlp(
        cls, x_BND: Tensor, weights: MLPWeights, eps: float, layer_scale_D: Tensor | None = None, gelu: Gelu = "erf"
    ) -> Tensor:
        """As `TorchOps.mlp`; the hidden activations are recomputed in the backward.

        The kernel has exact GELU and one dtype for everything. Under autocast, where the residual stays in float32 and
        only the products are narrow, PyTorch's operators run instead.
        """
        if gelu != "erf" or torch.is_autocast_enabled(x_BND.device.type):
            return cls.mlp(x_BND, weights, eps, layer_scale_D, gelu)
        from vat_fast.kernels import action_mlp

        return action_mlp(x_BND, *weights, eps, layer_scale_D)


_TRITON_EXCEPT = "the action MLP runs in PyTorch under autocast and with tanh GELU"


class Choice(NamedTuple):
    """Which operators run, and why."""

    ops: type[TorchOps]
    reason: str


def choose(backend: Backend, device: torch.device) -> Choice:
    """The operators that `backend` means for tensors on `device`.

    Raises:
        ValueError: Triton is asked for where it cannot run, or the backend is unknown.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if backend == "torch":
        return Choice(TorchOps, "asked for")
    if backend == "triton":
        if device.type != "cuda":
            raise ValueError(
                f"the Triton kernels need tensors on a CUDA or ROCm device, these are on {device.type!r}: "
                "move model and inputs there, or set backend to 'auto' or 'torch'"
            )
        if not has_triton:
            raise ValueError("the Triton kernels need the package triton, which is not installed: pip install triton")
        return Choice(TritonOps, f"asked for; {_TRITON_EXCEPT}")
    if backend == "auto":
        if device.type != "cuda":
            return Choice(TorchOps, f"no Triton kernels for {device.type!r} tensors")
        if not has_triton:
            return Choice(TorchOps, "the package triton is not installed")
        return Choice(TritonOps, f"CUDA or ROCm device with Triton; {_TRITON_EXCEPT}")
    raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
