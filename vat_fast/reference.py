"""ReferenceVAT: the yardstick. VAT as the paper writes it, in plain eager PyTorch, with no trick anywhere.

It has VAT's state_dict and shares nothing else with it but the configuration: naive attention, one loop over
views, both streams layer by layer, the network run anew for every denoising step. Do not make it faster.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vat_fast.config import VATConfig


def attention(q_BTD: Tensor, k_BSD: Tensor, v_BSD: Tensor, num_heads: int, scale: float) -> Tensor:
    """softmax(scale * q k^T) v by heads; (B, T, D)."""

    def heads(x: Tensor) -> Tensor:
        B, N, D = x.shape
        return x.reshape(B, N, num_heads, D // num_heads).permute(0, 2, 1, 3)

    scores = heads(q_BTD) @ heads(k_BSD).transpose(-1, -2) * scale
    out = scores.softmax(dim=-1) @ heads(v_BSD)
    return out.permute(0, 2, 1, 3).reshape(q_BTD.shape)


def scaled(x: Tensor, layer_scale: Tensor | None) -> Tensor:
    """LayerScale, where there is one."""
    return x if layer_scale is None else x * layer_scale


class ReferenceVisionBlock(nn.Module):
    """Parameters of one ViT block; without `whole`, only those that a last, merely read block has."""

    def __init__(self, c: VATConfig, whole: bool, layer_scale: bool) -> None:
        super().__init__()
        D = c.width
        self.norm1 = nn.LayerNorm(D, eps=c.norm_eps)
        self.ls1 = nn.Parameter(torch.ones(D) * (c.layer_scale or 0.0)) if layer_scale else None
        self.ls2 = nn.Parameter(torch.ones(D) * (c.layer_scale or 0.0)) if layer_scale else None
        if whole:
            self.qkv = nn.Linear(D, 3 * D)
            self.proj = nn.Linear(D, D)
            self.norm2 = nn.LayerNorm(D, eps=c.norm_eps)
            self.fc1 = nn.Linear(D, c.mlp_hidden)
            self.fc2 = nn.Linear(c.mlp_hidden, D)


class ReferenceFiLM(nn.Module):
    """Linear(D, 4D) - GELU - Linear(4D, 2D), halves gamma and beta."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, 2 * D)

    def forward(self, e_B1D: Tensor) -> tuple[Tensor, Tensor]:
        """gamma, beta: (B, 1, D) each."""
        out = self.fc2(F.gelu(self.fc1(e_B1D)))
        return torch.split(out, out.shape[-1] // 2, dim=-1)  # type: ignore[return-value]


class ReferenceActionBlock(nn.Module):
    """Parameters of one action layer."""

    def __init__(self, c: VATConfig) -> None:
        super().__init__()
        D, Da = c.width, c.width // c.action_width_divisor
        hidden = c.mlp_hidden // c.action_width_divisor
        self.film = ReferenceFiLM(Da) if c.task_conditioning == "film" else None
        if c.action_stream == "shared":
            return
        self.norm1 = nn.LayerNorm(Da, eps=c.norm_eps)
        self.query = nn.Linear(Da, Da)
        self.key_value = nn.Linear(D, 2 * Da)
        self.proj = nn.Linear(Da, Da)
        self.norm2 = nn.LayerNorm(Da, eps=c.norm_eps)
        self.fc1 = nn.Linear(Da, hidden)
        self.fc2 = nn.Linear(hidden, Da)
        if c.action_stream == "last_layer":
            self.norm_vision = nn.LayerNorm(D, eps=c.norm_eps)
            own = c.layer_scale is not None and c.action_width_divisor == 1
            self.ls1 = nn.Parameter(torch.ones(Da) * (c.layer_scale or 0.0)) if own else None
            self.ls2 = nn.Parameter(torch.ones(Da) * (c.layer_scale or 0.0)) if own else None


class ReferencePosition(nn.Module):
    """Factored position of token (c, k): step[c] + dim[k]."""

    def __init__(self, steps: int, per_step: int, D: int) -> None:
        super().__init__()
        self.step = nn.Parameter(nn.init.normal_(torch.empty(steps, D), std=5 / math.sqrt(D)))
        self.dim = nn.Parameter(nn.init.normal_(torch.empty(per_step, D), std=0.5 / math.sqrt(D)))


class ReferenceProjector(nn.Module):
    """Linear - GELU - Linear."""

    def __init__(self, width_in: int, D: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, D)
        self.fc2 = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width_in) -> (..., D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class ReferenceResidual(nn.Module):
    """x + ReLU(Linear(LN(x)))."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.fc = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return x + F.relu(self.fc(self.norm(x)))


class ReferenceHead(nn.Module):
    """(B, T, D) -> (B, C, A)."""

    def __init__(self, c: VATConfig, Da: int, per_step: int) -> None:
        super().__init__()
        self.chunk_size = c.chunk_size
        self.norm1 = nn.LayerNorm(per_step * Da)
        self.fc1 = nn.Linear(per_step * Da, Da)
        self.blocks = nn.ModuleList([ReferenceResidual(Da), ReferenceResidual(Da)])
        self.norm2 = nn.LayerNorm(Da)
        self.fc2 = nn.Linear(Da, c.action_dim)

    def forward(self, tokens_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (B, C, A)."""
        x = tokens_BTD.reshape(tokens_BTD.shape[0], self.chunk_size, -1)
        x = F.relu(self.fc1(self.norm1(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc2(self.norm2(x))


class ReferenceVAT(nn.Module):
    """VAT straight from the paper; every variant, VAT's state_dict, no optimisation.

    Args:
        config: the architecture.
    """

    def __init__(self, config: VATConfig) -> None:
        super().__init__()
        c = self.config = config
        D, Da = c.width, c.width // c.action_width_divisor
        self.D, self.Da = D, Da
        self.L = c.num_layers if c.num_layers is not None else c.depth - 1
        self.K = c.tokens_per_step if c.tokens_per_step is not None else c.action_dim
        self.T = c.chunk_size * self.K
        patches = (c.image_size // c.patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, D, kernel_size=c.patch_size, stride=c.patch_size)
        self.pos_embed = nn.Parameter(nn.init.normal_(torch.empty(1, patches, D), std=0.02))
        self.class_token = nn.Parameter(torch.zeros(1, 1, D)) if c.class_token else None
        self.register_tokens = nn.Parameter(torch.zeros(1, c.num_registers, D)) if c.num_registers else None
        vision_blocks = []
        for i in range(c.depth - 1 if c.action_stream == "last_layer" else self.L):
            whole = c.action_stream != "separate" or i < self.L - 1
            has_scale = c.layer_scale is not None and (whole or c.action_width_divisor == 1)
            vision_blocks.append(ReferenceVisionBlock(c, whole, has_scale))
        self.vision_blocks = nn.ModuleList(vision_blocks)
        self.action_blocks = nn.ModuleList([ReferenceActionBlock(c) for _ in range(self.L)])
        if c.head == "l1":
            self.action_tokens = nn.Parameter(torch.zeros(1, self.T, Da))
        else:
            self.noisy_action_projector = ReferenceProjector(1, Da)
        self.action_position = ReferencePosition(c.chunk_size, self.K, Da)
        self.task_embedding = nn.Embedding(c.num_tasks, Da) if c.task_conditioning != "none" else None
        self.proprio_projector = ReferenceProjector(c.proprio_dim, Da) if c.proprio_dim else None
        self.head = ReferenceHead(c, Da, self.K)

    def forward(
        self,
        pixels: Tensor,
        task_id: Tensor | None = None,
        proprio: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normalised actions (B, C, A) from pixels (B, V, 3, H, W), task_id (B,) and proprio (B, 8)."""
        c, B = self.config, pixels.shape[0]
        if c.head == "l1":
            return self.head(self.network(pixels, task_id, proprio))
        sample = torch.randn((B, c.chunk_size, c.action_dim), device=pixels.device, generator=generator).to(
            pixels.dtype
        )
        abar = self.alphas_cumprod()
        for t in range(c.diffusion_steps - 1, -1, -1):
            noise = self.predict_noise(pixels, sample, torch.full((B,), t, device=pixels.device), task_id, proprio)
            before = abar[t - 1] if t > 0 else 1.0
            clean = (sample - math.sqrt(1 - abar[t]) * noise) / math.sqrt(abar[t])
            sample = math.sqrt(before) * clean.clamp(-1, 1) + math.sqrt(1 - before) * noise
        return sample

    def predict_noise(
        self,
        pixels: Tensor,
        noisy_BCA: Tensor,
        timestep_B: Tensor,
        task_id: Tensor | None = None,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """The diffusion head's noise prediction, (B, C, A)."""
        return self.head(self.network(pixels, task_id, proprio, noisy_BCA, timestep_B))

    def alphas_cumprod(self) -> list[float]:
        """Cumulative products of 1 - beta of the cosine schedule (squaredcos_cap_v2)."""
        n, out, product = self.config.diffusion_steps, [], 1.0

        def alpha_bar(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        for i in range(n):
            beta = min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999)
            product *= 1 - beta
            out.append(product)
        return out

    def network(
        self,
        pixels: Tensor,
        task_id: Tensor | None,
        proprio: Tensor | None,
        noisy_BCA: Tensor | None = None,
        timestep_B: Tensor | None = None,
    ) -> Tensor:
        """Action tokens (B, T, Da) after the last layer."""
        c, B = self.config, pixels.shape[0]
        views = [self.embed(pixels[:, i]) for i in range(pixels.shape[1])]
        e_B1D = None
        if self.task_embedding is not None:
            assert task_id is not None
            e_B1D = self.task_embedding(task_id)[:, None]

        # Action tokens with their factored positions, then the extra tokens: timestep, proprioception.
        if noisy_BCA is None:
            a = self.action_tokens.expand(B, -1, -1)
        else:
            a = self.noisy_action_projector(noisy_BCA.reshape(B, -1, 1))
        p = self.action_position
        a = a + torch.stack([p.step[i] + p.dim[k] for i in range(c.chunk_size) for k in range(self.K)])
        if c.task_conditioning == "additive":
            assert e_B1D is not None
            a = a + e_B1D
        if timestep_B is not None:
            a = torch.cat([a, self.embed_timestep(timestep_B)[:, None].to(a.dtype)], dim=1)
        if self.proprio_projector is not None:
            a = torch.cat([a, self.proprio_projector(proprio)[:, None]], dim=1)

        if c.action_stream == "last_layer":
            for block in self.vision_blocks:
                views = [self.vision_layer(block, v) for v in views]
            prefix = int(c.class_token) + c.num_registers
            features = torch.cat([v[:, prefix:] for v in views], dim=1)
            for layer in self.action_blocks:
                a = self.baseline_action_layer(layer, a, e_B1D, features)
        else:
            for i, (layer, block) in enumerate(zip(self.action_blocks, self.vision_blocks, strict=True)):
                a_next = (
                    self.shared_action_layer(layer, block, a, e_B1D, views)
                    if c.action_stream == "shared"
                    else self.action_layer(layer, block, a, e_B1D, views)
                )
                if i < self.L - 1:  # Nothing reads the vision tokens of the last layer.
                    views = [self.vision_layer(block, v) for v in views]
                a = a_next
        return a[:, : self.T]

    def embed(self, image_B3HW: Tensor) -> Tensor:
        """One view's tokens: class and register tokens, then patches with their positions."""
        B = image_B3HW.shape[0]
        x = self.patch_embed(image_B3HW).reshape(B, self.D, -1).permute(0, 2, 1) + self.pos_embed
        if self.register_tokens is not None:
            x = torch.cat([self.register_tokens.expand(B, -1, -1), x], dim=1)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(B, -1, -1), x], dim=1)
        return x

    def embed_timestep(self, timestep_B: Tensor) -> Tensor:
        """[sin, cos] of t * exp(-ln(10000) i / (D/2 - 1))."""
        half = self.Da // 2
        frequency = torch.exp(torch.arange(half, device=timestep_B.device) * -math.log(10000) / (half - 1))
        angle = timestep_B[:, None] * frequency[None]
        return torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)

    def vision_layer(self, block: Any, v: Tensor) -> Tensor:
        """v' = v + LS1(W_o SelfAttn(W_qkv LN(v))); v_next = v' + LS2(MLP(LN(v')))."""
        q, k, val = torch.split(block.qkv(block.norm1(v)), self.D, dim=-1)
        out = attention(q, k, val, self.config.num_heads, (self.D // self.config.num_heads) ** -0.5)
        v = v + scaled(block.proj(out), block.ls1)
        return v + scaled(block.fc2(self.vision_gelu(block.fc1(block.norm2(v)))), block.ls2)

    def vision_gelu(self, x: Tensor) -> Tensor:
        """x * Phi(x), or its tanh approximation."""
        if self.config.vision_gelu == "erf":
            return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def scale(self) -> float:
        """Softmax scale of the action attention."""
        width = self.Da if self.config.action_scale == "action_head_dim" else self.D
        return (width // self.config.num_heads) ** -0.5

    def modulate(self, layer: Any, a: Tensor, e_B1D: Tensor | None) -> Tensor:
        """FiLM: a * (gamma + 1) + beta."""
        if layer.film is None:
            return a
        gamma, beta = layer.film(e_B1D)
        return a * (gamma + 1) + beta

    def action_layer(self, layer: Any, block: Any, a: Tensor, e_B1D: Tensor | None, views: list[Tensor]) -> Tensor:
        """One layer of VAT's action stream; LayerScale is the vision block's."""
        na = layer.norm1(self.modulate(layer, a, e_B1D))
        nv = torch.cat([block.norm1(v) for v in views], dim=1)
        # Extra tokens are keys too, in front of the vision tokens; VAT-small (Da < D) has none.
        source = torch.cat([na[:, self.T :], nv], dim=1) if na.shape[1] > self.T else nv
        k, v = torch.split(layer.key_value(source), self.Da, dim=-1)
        ls = (block.ls1, block.ls2) if self.Da == self.D else (None, None)
        a = a + scaled(layer.proj(attention(layer.query(na), k, v, self.config.num_heads, self.scale())), ls[0])
        return a + scaled(layer.fc2(F.gelu(layer.fc1(layer.norm2(a)))), ls[1])

    def shared_action_layer(
        self, layer: Any, block: Any, a: Tensor, e_B1D: Tensor | None, views: list[Tensor]
    ) -> Tensor:
        """One layer of VAT-ViT: everything but FiLM is the vision block's."""
        read = views[-1:] if self.config.shared_keys == "last_view" else views
        na = block.norm1(self.modulate(layer, a, e_B1D))
        q, _, _ = torch.split(block.qkv(na), self.D, dim=-1)
        source = torch.cat([na[:, self.T :], block.norm1(torch.cat(read, dim=1))], dim=1)
        _, k, v = torch.split(block.qkv(source), self.D, dim=-1)
        a = a + scaled(block.proj(attention(q, k, v, self.config.num_heads, self.scale())), block.ls1)
        return a + scaled(block.fc2(self.vision_gelu(block.fc1(block.norm2(a)))), block.ls2)

    def baseline_action_layer(self, layer: Any, a: Tensor, e_B1D: Tensor | None, features: Tensor) -> Tensor:
        """One layer of the last-layer baseline; FiLM's result replaces the residual as well."""
        a = self.modulate(layer, a, e_B1D)
        na, nv = layer.norm1(a), layer.norm_vision(features)
        source = torch.cat([na[:, self.T :], nv], dim=1) if na.shape[1] > self.T else nv
        k, v = torch.split(layer.key_value(source), self.Da, dim=-1)
        a = a + scaled(layer.proj(attention(layer.query(na), k, v, self.config.num_heads, self.scale())), layer.ls1)
        return a + scaled(layer.fc2(F.gelu(layer.fc1(layer.norm2(a)))), layer.ls2)
