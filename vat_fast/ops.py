"""The operators a VAT layer is made of, one class per backend, and the choice between them.

`VAT.backend` says what a model runs: "torch", "triton", "native" (operators compiled for this processor), or "auto":
Triton where the tensors are on a CUDA or ROCm device; on CPUs the compiled operators where they can be built and are
faster; PyTorch elsewhere. `choose` says which it is on a given device, and why.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vat_fast import cpu_attention
from vat_fast.config import Gelu
from vat_fast.native import functions, library, trial

Backend = Literal["auto", "torch", "triton", "native"]


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
    def norm_linears(
        x_BND: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, linears: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """x to go on with, and what each linear (weight, bias) makes of LN(x)."""
        nx = F.layer_norm(x_BND, x_BND.shape[-1:], norm_weight, norm_bias, eps)
        return x_BND, [F.linear(nx, weight, bias) for weight, bias in linears]

    @staticmethod
    def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x W^T + b."""
        return F.linear(x, weight, bias)

    @staticmethod
    def linear_residual(
        residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, layer_scale_D: Tensor | None = None
    ) -> Tensor:
        """residual + ls * (x W^T + b)."""
        h = F.linear(x, weight, bias)
        return residual + h if layer_scale_D is None else torch.addcmul(residual, h, layer_scale_D)

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


class NativeOps(TorchOps):
    """The operators compiled for this processor, in float32, forward and backward; see `vat_fast.native`.

    Each works on blocks of rows that stay in the caches. Other dtypes, autocast and what is being compiled by
    `torch.compile` run as `TorchOps`.
    """

    name = "native"

    @classmethod
    def norm_linears(
        cls, x_BND: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, linears: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor]]:
        """As `TorchOps.norm_linears`, in one pass over x."""
        if not _is_float32(x_BND):
            return super().norm_linears(x_BND, norm_weight, norm_bias, eps, linears)
        if any(t.requires_grad for t in (x_BND, norm_weight, norm_bias)):
            return functions.norm_linears(x_BND, norm_weight, norm_bias, eps, linears)
        # With a frozen stream before them one linear may train and another may not: its output then has no gradient.
        outs = [functions.norm_linears(x_BND, norm_weight, norm_bias, eps, [pair])[1][0] for pair in linears]
        return x_BND, outs

    @classmethod
    def linear(cls, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """As `TorchOps.linear`."""
        return functions.linear(x, weight, bias) if _is_float32(x) else super().linear(x, weight, bias)

    @classmethod
    def linear_residual(
        cls, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor, layer_scale_D: Tensor | None = None
    ) -> Tensor:
        """As `TorchOps.linear_residual`; LayerScale goes into the weight."""
        if not _is_float32(x):
            return super().linear_residual(residual, x, weight, bias, layer_scale_D)
        return functions.linear(x, *_scaled(weight, bias, layer_scale_D), residual)

    @classmethod
    def vision_attention(cls, qkv_NP3D: Tensor, num_heads: int, scale: float) -> Tensor:
        """As `TorchOps.vision_attention`; no map of weights is ever in memory."""
        if not _is_float32(qkv_NP3D):
            return super().vision_attention(qkv_NP3D, num_heads, scale)
        return functions.vision_attention(qkv_NP3D, num_heads, scale)

    @classmethod
    def cross_attention(
        cls,
        q_BTD: Tensor,
        kv_vision_BS2D: Tensor,
        num_heads: int,
        scale: float,
        kv_extra_BE2D: Tensor | None = None,
        need_map: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `TorchOps.cross_attention`, which makes the map where it is asked for."""
        if need_map or not _is_float32(q_BTD):
            return super().cross_attention(q_BTD, kv_vision_BS2D, num_heads, scale, kv_extra_BE2D, need_map)
        kv = kv_vision_BS2D if kv_extra_BE2D is None else torch.cat([kv_extra_BE2D, kv_vision_BS2D], dim=1)
        return functions.cross_attention(q_BTD, kv, num_heads, scale), None

    @classmethod
    def mlp(
        cls, x_BND: Tensor, weights: MLPWeights, eps: float, layer_scale_D: Tensor | None = None, gelu: Gelu = "erf"
    ) -> Tensor:
        """As `TorchOps.mlp`, with the exact GELU; the hidden activations stay in the caches."""
        if gelu != "erf" or not _is_float32(x_BND):
            return super().mlp(x_BND, weights, eps, layer_scale_D, gelu)
        w = weights
        fc2 = _scaled(w.fc2_weight, w.fc2_bias, layer_scale_D)
        return functions.mlp(x_BND, w.norm_weight, w.norm_bias, eps, (w.fc1_weight, w.fc1_bias), fc2)


def _is_float32(x: Tensor) -> bool:
    """Whether the compiled operators take this tensor, here and now."""
    is_autocast = torch.is_autocast_enabled("cpu")
    return x.dtype == torch.float32 and not is_autocast and not torch.compiler.is_compiling()


def _scaled(weight: Tensor, bias: Tensor, layer_scale_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """A linear whose outputs are multiplied by LayerScale."""
    return (weight, bias) if layer_scale_D is None else (weight * layer_scale_D[:, None], bias * layer_scale_D)


_TRITON_EXCEPT = "the action MLP runs in PyTorch under autocast and with tanh GELU"
_NATIVE_EXCEPT = "float32 alone; bfloat16, attention maps and tanh GELU run in PyTorch"


class Choice(NamedTuple):
    """Which operators run, and why."""

    ops: type[TorchOps]
    reason: str


def choose(backend: Backend, device: torch.device) -> Choice:
    """The operators that `backend` means for tensors on `device`.

    Raises:
        ValueError: Triton or the compiled operators are asked for where they cannot run, or the backend is unknown.
    """
    if backend == "torch":
        return Choice(TorchOps, "asked for")
    if backend == "triton":
        return _triton(device)
    if backend == "native":
        return _native(device)
    if backend != "auto":
        raise ValueError(f"backend must be 'auto', 'torch', 'triton' or 'native', got {backend!r}")
    if device.type == "cpu":
        if torch.compiler.is_compiling():
            return Choice(TorchOps, "torch.compile makes its own operators")
        return _fastest_on_cpus()
    if device.type != "cuda":
        return Choice(TorchOps, f"no kernels for {device.type!r} tensors")
    if not _has_triton():
        return Choice(TorchOps, "the package triton is not installed")
    return Choice(TritonOps, f"CUDA or ROCm device with Triton; {_TRITON_EXCEPT}")


def _fastest_on_cpus() -> Choice:
    if missing := library.why_not():
        return Choice(TorchOps, missing)
    speed = trial.speed()
    found = f"{speed:.2f} times PyTorch's speed in a trial on this machine"
    if speed < 1:
        return Choice(TorchOps, f"the compiled operators have {found}")
    return Choice(NativeOps, f"compiled for this processor, {found}; {_NATIVE_EXCEPT}")


def _triton(device: torch.device) -> Choice:
    if device.type != "cuda":
        raise ValueError(
            f"the Triton kernels need tensors on a CUDA or ROCm device, these are on {device.type!r}: "
            "move model and inputs there, or set backend to 'auto' or 'torch'"
        )
    if not _has_triton():
        raise ValueError("the Triton kernels need the package triton, which is not installed: pip install triton")
    return Choice(TritonOps, f"asked for; {_TRITON_EXCEPT}")


def _native(device: torch.device) -> Choice:
    if device.type != "cpu":
        raise ValueError(
            f"the compiled operators need tensors on a CPU, these are on {device.type!r}: "
            "move model and inputs there, or set backend to 'auto'"
        )
    if missing := library.why_not():
        raise ValueError(f"backend 'native' cannot run: {missing}")
    return Choice(NativeOps, f"asked for; {_NATIVE_EXCEPT}")


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
