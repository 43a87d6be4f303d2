"""The layers of VAT: vision block, action block, FiLM, action positions and the small projectors.

A layer's modules only hold parameters and say how they combine; the arithmetic is in `ops`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vat_fast.config import VATConfig
from vat_fast.ops import MLPWeights, TorchOps


def parameters_of(layer: nn.Linear, rows: slice | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias, or only the output features in `rows`."""
    weight, bias = weight_of(layer), layer.bias
    return (weight, bias) if rows is None else (weight[rows], bias[rows])


def weight_of(layer: Any) -> Tensor:
    """The weight of a linear, with its low-rank updates where the library peft has put adapters around it.

    peft replaces a linear by a module that keeps it as `base_layer` and applies the adapters in its forward, which no
    backend calls. That attribute tells the two apart, so that only who trains adapters needs peft.
    """
    if not hasattr(layer, "base_layer"):
        weight: Tensor = layer.weight
        return weight
    base = weight = layer.base_layer.weight
    if not (layer.merged or layer.disable_adapters):
        for adapter in layer.active_adapters:
            weight = weight + layer.get_delta_weight(adapter)
    return weight.to(base.dtype)


class VisionBlock(nn.Module):
    """One pre-norm ViT block, applied to each view by itself.

    Args:
        config: the architecture.
        reads_only: the block's output is never read (the last layer of a separate stream), so that only the
            norm the action layer reads through exists.
    """

    def __init__(self, config: VATConfig, reads_only: bool = False) -> None:
        super().__init__()
        D, hidden = config.width, config.mlp_hidden
        self.num_heads, self.scale = config.num_heads, config.head_dim**-0.5
        self.eps, self.gelu = config.norm_eps, config.vision_gelu
        self.norm1 = nn.LayerNorm(D, eps=config.norm_eps)
        # LayerScale serves the action layer beside this block too, so it exists in either case.
        ls = config.layer_scale if not reads_only or config.action_layer_scale else None
        self.ls1 = None if ls is None else nn.Parameter(torch.full((D,), ls))
        self.ls2 = None if ls is None else nn.Parameter(torch.full((D,), ls))
        if reads_only:
            return
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=config.norm_eps)
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)
        for layer in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x_NPD: Tensor, qkv_NP3D: Tensor, ops: type[TorchOps]) -> Tensor:
        """The block's output, given `qkv = self.qkv(self.norm1(x))`; (N, P, D), N = B * V views."""
        out = ops.vision_attention(qkv_NP3D, self.num_heads, self.scale)
        x_NPD = ops.linear_residual(x_NPD, out, *parameters_of(self.proj), self.ls1)
        return ops.mlp(x_NPD, mlp_weights(self), self.eps, self.ls2, self.gelu)


class FiLM(nn.Module):
    """Task embedding -> (gamma, beta): Linear(D, 4D), GELU, Linear(4D, 2D); paper section 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, 2 * width)
        for layer in (self.fc1, self.fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, task_BD: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and beta, (B, D) each."""
        gamma_BD, beta_BD = self.fc2(F.gelu(self.fc1(task_BD))).chunk(2, dim=-1)
        return gamma_BD, beta_BD


@dataclass
class ActionWeights:
    """The modules one action layer runs with: its own, or the vision block's where weights are shared."""

    norm1: nn.LayerNorm
    query: nn.Linear
    query_rows: slice | None
    key_value: nn.Linear
    key_value_rows: slice | None
    proj: nn.Linear
    mlp: MLPWeights
    ls1: Tensor | None
    ls2: Tensor | None


class ActionBlock(nn.Module):
    """One layer of the action stream: FiLM, cross-attention to this layer's vision tokens, MLP.

    With shared weights (VAT-ViT) it owns nothing but its FiLM and runs on the vision block's modules.
    """

    def __init__(self, config: VATConfig, layer_index: int) -> None:
        super().__init__()
        D, Da, hidden = config.width, config.action_width, config.action_mlp_hidden
        self.config, self.layer_index = config, layer_index
        self.film = FiLM(Da) if config.task_conditioning == "film" else None
        if config.action_stream == "shared":
            return
        eps = config.norm_eps
        self.norm1 = nn.LayerNorm(Da, eps=eps)
        self.query = nn.Linear(Da, Da)
        self.key_value = nn.Linear(D, 2 * Da)
        self.proj = nn.Linear(Da, Da)
        self.norm2 = nn.LayerNorm(Da, eps=eps)
        self.fc1 = nn.Linear(Da, hidden)
        self.fc2 = nn.Linear(hidden, Da)
        if config.action_stream == "last_layer":
            # The baseline's ViT is a plain one, so its action layers bring what they need of their own.
            self.norm_vision = nn.LayerNorm(D, eps=eps)
            ls = config.layer_scale if config.action_layer_scale else None
            self.ls1 = None if ls is None else nn.Parameter(torch.full((Da,), ls))
            self.ls2 = None if ls is None else nn.Parameter(torch.full((Da,), ls))

    def weights(self, vision: VisionBlock | None) -> ActionWeights:
        """The modules this layer runs with; `vision` is the block beside it (None in the last-layer baseline)."""
        if self.config.action_stream == "shared":
            assert vision is not None
            v, D = vision, self.config.width
            rows = (slice(0, D), slice(D, 3 * D))
            return ActionWeights(v.norm1, v.qkv, rows[0], v.qkv, rows[1], v.proj, mlp_weights(v), v.ls1, v.ls2)
        owner = self if vision is None else vision
        ls1, ls2 = (owner.ls1, owner.ls2) if self.config.action_layer_scale else (None, None)
        return ActionWeights(self.norm1, self.query, None, self.key_value, None, self.proj, mlp_weights(self), ls1, ls2)

    def forward(
        self,
        a_BND: Tensor,
        task_BD: Tensor | None,
        memory_BS2D: Tensor,
        vision: VisionBlock | None,
        ops: type[TorchOps],
        need_map: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The next action stream (B, T + E, D) and, where asked for, the attention map (B, H, T + E, keys).

        Args:
            a_BND: action tokens and extra tokens.
            task_BD: task embedding, read by FiLM alone.
            memory_BS2D: keys and values of this layer's vision tokens.
            vision: the vision block beside this layer, or None in the last-layer baseline.
            ops: the backend.
            need_map: also return the attention map.
        """
        c, w = self.config, self.weights(vision)
        gamma, beta = (None, None) if self.film is None or task_BD is None else self.film(task_BD)
        if c.action_stream == "last_layer" and gamma is not None and beta is not None:
            # In the baseline FiLM's result replaces the residual too.
            a_BND = torch.addcmul(beta[:, None], a_BND, gamma[:, None] + 1)
            gamma = beta = None
        na = ops.film_layernorm(a_BND, gamma, beta, w.norm1.weight, w.norm1.bias, c.norm_eps)
        extra = None
        if c.num_extra_tokens:
            extra = ops.linear(na[:, c.num_action_tokens :], *parameters_of(w.key_value, w.key_value_rows))
        q = ops.linear(na, *parameters_of(w.query, w.query_rows))
        out, attention = ops.cross_attention(q, memory_BS2D, c.num_heads, c.action_attention_scale, extra, need_map)
        a_BND = ops.linear_residual(a_BND, out, *parameters_of(w.proj), w.ls1)
        gelu = c.vision_gelu if c.action_stream == "shared" else "erf"
        return ops.action_mlp(a_BND, w.mlp, c.norm_eps, w.ls2, gelu), attention


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """Normally distributed around zero."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


class ActionPosition(nn.Module):
    """Factored position of action token (c, k): step[c] + dim[k]."""

    def __init__(self, chunk_size: int, tokens_per_step: int, width: int) -> None:
        super().__init__()
        self.step = normal_parameter(chunk_size, width, std=5 * width**-0.5)
        self.dim = normal_parameter(tokens_per_step, width, std=0.5 * width**-0.5)

    def forward(self) -> Tensor:
        """(1, T, D), token t = c * tokens_per_step + k."""
        return (self.step[:, None] + self.dim[None]).flatten(0, 1)[None]


class Projector(nn.Module):
    """Linear - GELU - Linear, for proprioception and for noisy actions."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_width) -> (..., width)."""
        return self.fc2(F.gelu(self.fc1(x)))


def mlp_weights(block: VisionBlock | ActionBlock) -> MLPWeights:
    """The MLP of a block, with the norm in front of it."""
    norm = block.norm2
    return MLPWeights(norm.weight, norm.bias, *parameters_of(block.fc1), *parameters_of(block.fc2))
