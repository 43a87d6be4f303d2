"""VAT: a ViT whose every layer feeds a parallel action stream (arXiv 2512.06013).

    vision stream   x -> block 1 -> block 2 -> ...          views are a batch dimension
                        |           |
                        v           v                       keys and values of each layer's vision tokens
    action stream   a -> layer 1 -> layer 2 -> ... -> head  FiLM by task, cross-attention, MLP

The vision stream never looks at the action stream, so it runs first and hands over one memory (keys and values)
per layer; a diffusion policy reuses the memories in all its denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vat_fast.config import VATConfig
from vat_fast.heads import DDIM, MLPHead, timestep_embedding
from vat_fast.layers import ActionBlock, ActionPosition, Projector, VisionBlock, normal_parameter, parameters_of
from vat_fast.ops import Backend, TorchOps, choose

if TYPE_CHECKING:
    from vat_fast.frozen.engine import FrozenVAT


class VATDetails(NamedTuple):
    """What happened inside one forward."""

    actions: Tensor
    """Normalised, (B, C, A)."""
    action_tokens: tuple[Tensor, ...]
    """The action stream after each layer, (B, T + E, D) each."""
    attention: tuple[Tensor, ...]
    """Each layer's attention map (B, H, T + E, keys); keys are the extra tokens, then the vision tokens by view."""


class VAT(nn.Module):
    """Vision Action Transformer.

        vat = VAT(VATConfig.from_preset("siglip2-so400m"))
        actions = vat(pixels, task_id)          # (B, C, A), normalised

    Args:
        config: the architecture; `VATConfig.from_preset(...)` for the paper's.
    """

    vision_blocks: Any  # ModuleList of VisionBlock
    action_blocks: Any  # ModuleList of ActionBlock

    def __init__(self, config: VATConfig) -> None:
        super().__init__()
        c, D, Da = config, config.width, config.action_width
        self.config = config
        self.backend: Backend = "auto"
        """What computes the layers: "auto", "torch" or "triton"; see `vat_fast.ops.choose`."""
        self.recompute_layers = False
        """Training keeps only what enters each layer and runs the layer again in the backward: less memory, more time
        (activation checkpointing)."""

        self.patch_embed = nn.Conv2d(3, D, c.patch_size, stride=c.patch_size)
        self.pos_embed = normal_parameter(1, c.num_patches, D, std=0.02)
        self.class_token = normal_parameter(1, 1, D, std=0.02) if c.class_token else None
        self.register_tokens = normal_parameter(1, c.num_registers, D, std=0.02) if c.num_registers else None
        # The last vision block of a separate stream is only read through its norm: the rest would be dead.
        last_read_only = c.vision_layers - 1 if c.action_stream == "separate" else None
        self.vision_blocks = nn.ModuleList(
            VisionBlock(c, reads_only=index == last_read_only) for index in range(c.vision_layers)
        )

        if c.head == "l1":
            self.action_tokens = nn.Parameter(torch.zeros(1, c.num_action_tokens, Da))
        else:
            self.noisy_action_projector = Projector(1, Da)
            self.ddim = DDIM(c.diffusion_steps)
        self.action_position = ActionPosition(c.chunk_size, c.tokens_in_step, Da)
        self.task_embedding = nn.Embedding(c.num_tasks, Da) if c.task_conditioning != "none" else None
        self.proprio_projector = Projector(c.proprio_dim, Da) if c.proprio_dim else None
        self.action_blocks = nn.ModuleList(ActionBlock(c, index) for index in range(c.layers))
        self.head = MLPHead(c.tokens_in_step, Da, c.action_dim)
        self.freeze_untrained()

    # The forward pass.

    def forward(
        self,
        pixels: Tensor,
        task_id: Tensor | int | None = None,
        proprio: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Normalised actions (B, C, A).

        Args:
            pixels: normalised images (B, V, 3, H, W), or with the views on the channel axis as the authors have
                it, (B, 3V, H, W).
            task_id: (B,) integers, or one int for the whole batch; not read without task conditioning.
            proprio: (B, proprio_dim) normalised, exactly when the configuration has proprioception.
            generator: source of the starting noise; read by the diffusion head alone.

        Raises:
            ValueError: an input of another shape than the configuration's, or missing.
        """
        pixels, task_BD, proprio_BE = self._check_inputs(pixels, task_id, proprio)
        memories = self.vision_stream(pixels)
        if self.config.head == "diffusion":
            return self._denoise(memories, task_BD, proprio_BE, generator)[0]
        return self.head(self.action_stream(memories, task_BD, proprio_BE))

    def vision_stream(self, pixels_BV3HW: Tensor) -> list[Tensor]:
        """Each action layer's memory: keys and values of its vision tokens, (B, keys, 2 * action width)."""
        c, B, ops = self.config, pixels_BV3HW.shape[0], choose(self.backend, pixels_BV3HW.device).ops
        x = self._embed(pixels_BV3HW.flatten(0, 1))
        if c.action_stream == "last_layer":
            for block in self.vision_blocks:
                x, (qkv,) = _norm_linears(x, block.norm1, [parameters_of(block.qkv)], ops)
                x = block(x, qkv, ops)
            x = x[:, c.num_prefix :].reshape(B, -1, c.width)
            memories = []
            for layer in self.action_blocks:
                x, (memory,) = _norm_linears(x, layer.norm_vision, [parameters_of(layer.key_value)], ops)
                memories.append(memory)
            return memories
        memories = []
        for index in range(c.layers):
            memory, x = self._run(self._vision_layer, index, x, B, ops)
            memories.append(memory)
        return memories

    def vision_tokens(self, pixels_BV3HW: Tensor) -> Tensor:
        """What the last action layer reads, before its norm: (B, V, prefix + P, D); to train the vision stream alone.

        Args:
            pixels_BV3HW: normalised images.
        """
        ops = choose(self.backend, pixels_BV3HW.device).ops
        x = self._embed(pixels_BV3HW.flatten(0, 1))
        read_only = self.config.action_stream != "last_layer"
        for block in self.vision_blocks[: -1 if read_only else None]:
            x, (qkv,) = _norm_linears(x, block.norm1, [parameters_of(block.qkv)], ops)
            x = block(x, qkv, ops)
        return x.unflatten(0, pixels_BV3HW.shape[:2])

    def action_stream(
        self,
        memories: list[Tensor],
        task_BD: Tensor | None,
        proprio_BE: Tensor | None,
        noisy_BCA: Tensor | None = None,
        timestep_B: Tensor | None = None,
        record: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Action tokens (B, T, D) after the last layer.

        Args:
            memories: what `vision_stream` gave.
            task_BD: task embedding, or None without task conditioning.
            proprio_BE: normalised proprioception, or None.
            noisy_BCA: noisy actions (diffusion head).
            timestep_B: diffusion timesteps (diffusion head).
            record: where given, (stream, attention map) of each layer is appended.
        """
        c, B, ops = self.config, memories[0].shape[0], choose(self.backend, memories[0].device).ops
        if noisy_BCA is None:
            a = self.action_tokens.expand(B, -1, -1)
        else:
            a = self.noisy_action_projector(noisy_BCA.flatten(1)[..., None])
        a = a + self.action_position()
        if c.task_conditioning == "additive" and task_BD is not None:
            a = a + task_BD[:, None]
        extra = []
        if timestep_B is not None:
            extra.append(timestep_embedding(timestep_B, c.action_width).to(a.dtype)[:, None])
        if self.proprio_projector is not None and proprio_BE is not None:
            extra.append(self.proprio_projector(proprio_BE)[:, None])
        a = torch.cat([a, *extra], dim=1)
        for index, (layer, memory) in enumerate(zip(self.action_blocks, memories, strict=True)):
            vision = None if c.action_stream == "last_layer" else self.vision_blocks[index]
            a, attention = self._run(layer, a, task_BD, memory, vision, ops, record is not None)
            if record is not None:
                record.append((a, attention))
        return a[:, : c.num_action_tokens]

    def predict_noise(
        self,
        pixels: Tensor,
        noisy_BCA: Tensor,
        timestep_B: Tensor,
        task_id: Tensor | int | None = None,
        proprio: Tensor | None = None,
    ) -> Tensor:
        """The noise (B, C, A) that the diffusion head sees in noisy actions at timesteps (B,).

        Raises:
            ValueError: the model has no diffusion head, or an input does not fit.
        """
        if self.config.head != "diffusion":
            raise ValueError(f"predict_noise needs the diffusion head, this model has {self.config.head!r}")
        pixels, task_BD, proprio_BE = self._check_inputs(pixels, task_id, proprio)
        memories = self.vision_stream(pixels)
        return self.head(self.action_stream(memories, task_BD, proprio_BE, noisy_BCA, timestep_B))

    def details(
        self,
        pixels: Tensor,
        task_id: Tensor | int | None = None,
        proprio: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> VATDetails:
        """As `forward`, with every layer's action tokens and attention maps (of the last denoising step)."""
        pixels, task_BD, proprio_BE = self._check_inputs(pixels, task_id, proprio)
        memories = self.vision_stream(pixels)
        record: list[tuple[Tensor, Tensor]] = []
        if self.config.head == "diffusion":
            actions, record = self._denoise(memories, task_BD, proprio_BE, generator, keep_record=True)
        else:
            actions = self.head(self.action_stream(memories, task_BD, proprio_BE, record=record))
        return VATDetails(actions, tuple(a for a, _ in record), tuple(attention for _, attention in record))

    # Training.

    def loss(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> Tensor:
        """The training loss of one batch, a scalar.

        L1 head: mean |prediction - action|. Diffusion head: mean squared error of the predicted noise at random
        timesteps.

        Args:
            batch: `pixels` and `actions` (B, C, A), normalised; `task_id` (B,) and `proprio` where the
                configuration has them.
            generator: source of noise and timesteps (diffusion head).

        Raises:
            ValueError: a missing entry or a shape that does not fit.
        """
        prediction, target = self.predict(batch, generator)
        return (F.l1_loss if self.config.head == "l1" else F.mse_loss)(prediction, target)

    def predict(self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """What `loss` compares, (B, C, A) both: prediction and target; actions, or noise with the diffusion head."""
        for name in ("pixels", "actions"):
            if name not in batch:
                raise ValueError(f"batch has no {name!r}; it has {', '.join(batch)}")
        c, actions = self.config, batch["actions"]
        pixels, task_BD, proprio_BE = self._check_inputs(batch["pixels"], batch.get("task_id"), batch.get("proprio"))
        if actions.shape != (len(pixels), c.chunk_size, c.action_dim):
            raise ValueError(
                f"actions must be (batch, chunk_size, action_dim) = {(len(pixels), c.chunk_size, c.action_dim)}, "
                f"got {tuple(actions.shape)}"
            )
        memories = self.vision_stream(pixels)
        if c.head == "l1":
            return self.head(self.action_stream(memories, task_BD, proprio_BE)), actions
        device = actions.device
        noise = torch.randn(actions.shape, dtype=actions.dtype, device=device, generator=generator)
        timestep_B = torch.randint(c.diffusion_steps, (len(actions),), device=device, generator=generator)
        noisy = self.ddim.add_noise(actions, noise, timestep_B)
        return self.head(self.action_stream(memories, task_BD, proprio_BE, noisy, timestep_B)), noise

    # The frozen policy; the work is in frozen/.

    def freeze(self, **options: Any) -> FrozenVAT:
        """This model as the fastest policy step for a device, same call signature; see `frozen.engine.FrozenVAT`.

            frozen = vat.freeze(batch=1, dtype="bf16", device="cuda")
            print(frozen.explain())

        Args:
            options: batch, views, dtype, device, executor, images, without, ...: see `FrozenVAT`.

        Raises:
            ValueError: an option that cannot be, in one sentence.
        """
        from vat_fast.frozen.engine import FrozenVAT

        return FrozenVAT(self, **options)

    # Weights in and out; the work is in checkpoint.py, released.py and timm_weights.py.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into `folder`, each replaced atomically."""
        from vat_fast.checkpoint import save_model

        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, dtype: torch.dtype | None = None) -> VAT:
        """The model saved in a local folder or Hub repository: ours, or one of the authors' released folders.

        Returned in eval mode. `dtype` None keeps the file's.
        """
        from vat_fast.checkpoint import load_model

        return load_model(name_or_folder, dtype)

    @classmethod
    def from_timm(cls, name: str, pretrained: bool = True, **overrides: Any) -> VAT:
        """A VAT whose vision stream has a timm ViT's weights and whose action stream is new.

        Args:
            name: a preset's name, or the timm name of a ViT.
            pretrained: load timm's trained weights (needs the Hub or timm's cache).
            overrides: VATConfig fields to set.
        """
        from vat_fast.timm_weights import vat_from_timm

        return vat_from_timm(name, pretrained, overrides)

    # Helpers.

    def _run(self, layer: Callable[..., tuple[Tensor, Any]], *inputs: Any) -> tuple[Tensor, Any]:
        """`layer(*inputs)`; its activations are computed again in the backward where `recompute_layers` is set."""
        if self.recompute_layers and torch.is_grad_enabled():
            # Nothing in a layer is random.
            return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
        return layer(*inputs)

    def _vision_layer(self, index: int, x_NPD: Tensor, B: int, ops: type[TorchOps]) -> tuple[Tensor, Tensor]:
        """Layer `index` of the vision stream: its memory for the action stream, and what the next layer reads."""
        c, block, is_last = self.config, self.vision_blocks[index], index == self.config.layers - 1
        if c.action_stream == "shared":
            # Nothing asks for the last layer's vision queries.
            rows = slice(c.width, None) if is_last else None
            x_NPD, (qkv,) = _norm_linears(x_NPD, block.norm1, [parameters_of(block.qkv, rows)], ops)
            memory = qkv[..., -2 * c.width :].unflatten(0, (B, -1))
            memory = (memory[:, -1:] if c.shared_keys == "last_view" else memory).flatten(1, 2)
            return memory, x_NPD if is_last else block(x_NPD, qkv, ops)
        linears = [parameters_of(self.action_blocks[index].key_value)]
        if not is_last:
            linears.append(parameters_of(block.qkv))
        x_NPD, outs = _norm_linears(x_NPD, block.norm1, linears, ops)
        memory = outs[0].unflatten(0, (B, -1)).flatten(1, 2)
        return memory, x_NPD if is_last else block(x_NPD, outs[1], ops)

    def _embed(self, pixels_N3HW: Tensor) -> Tensor:
        """Patches with positions behind class and register tokens, (N, prefix + P, D)."""
        x = self.patch_embed(pixels_N3HW).flatten(2).transpose(1, 2) + self.pos_embed
        prefix = [token for token in (self.class_token, self.register_tokens) if token is not None]
        return torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1) if prefix else x

    def _denoise(
        self,
        memories: list[Tensor],
        task_BD: Tensor | None,
        proprio_BE: Tensor | None,
        generator: torch.Generator | None,
        keep_record: bool = False,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """DDIM from noise to actions (B, C, A), and the last step's record."""
        c, like = self.config, memories[0]
        shape = (like.shape[0], c.chunk_size, c.action_dim)
        # Denoising accumulates in float32 at least, whatever the network computes in.
        wide = torch.promote_types(like.dtype, torch.float32)
        sample = torch.randn(shape, device=like.device, generator=generator).to(wide)
        record: list[tuple[Tensor, Tensor]] = []
        for t in reversed(range(c.diffusion_steps)):
            timestep_B = torch.full(shape[:1], t, device=like.device)
            keep = record if keep_record and t == 0 else None
            tokens = self.action_stream(memories, task_BD, proprio_BE, sample.to(like.dtype), timestep_B, keep)
            sample = self.ddim.step(self.head(tokens).to(wide), t, sample)
        return sample.to(like.dtype), record

    def _check_inputs(
        self, pixels: Tensor, task_id: Tensor | int | None, proprio: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Pixels as (B, V, 3, H, W), the task embedding (B, D) and proprioception, or one clear ValueError."""
        c = self.config
        if pixels.ndim == 4 and pixels.shape[1] == 3 * c.num_views:
            pixels = pixels.unflatten(1, (c.num_views, 3))
        expected = (c.num_views, 3, c.image_size, c.image_size)
        if pixels.ndim != 5 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(
                f"pixels must be (B, V, 3, H, W) with V, 3, H, W = {expected}, or (B, 3V, H, W); "
                f"got {tuple(pixels.shape)}"
            )
        if not pixels.is_floating_point():
            raise ValueError(f"pixels must be normalised floats, got {pixels.dtype}; Policy takes raw uint8 images")
        B = len(pixels)
        task_BD = None
        if self.task_embedding is not None:
            if task_id is None:
                raise ValueError(f"task_id is missing: this model is conditioned on one of {c.num_tasks} tasks")
            ids = torch.as_tensor(task_id, device=pixels.device)
            ids = ids.expand(B) if ids.ndim == 0 else ids
            if ids.shape != (B,) or ids.is_floating_point():
                raise ValueError(f"task_id must be {B} integers, one per sample, got {ids.dtype} {tuple(ids.shape)}")
            # On an accelerator the check would wait for the device; embedding's own bounds check speaks there.
            if ids.device.type == "cpu" and not torch.compiler.is_compiling():
                low, high = int(ids.min()), int(ids.max())
                if low < 0 or high >= c.num_tasks:
                    raise ValueError(f"task_id must be 0 to {c.num_tasks - 1}, got {low if low < 0 else high}")
            task_BD = self.task_embedding(ids)
        if (proprio is not None) != bool(c.proprio_dim):
            given = "none was given" if proprio is None else f"got one of shape {tuple(proprio.shape)}"
            raise ValueError(f"this model takes a proprio vector of width {c.proprio_dim} (0: none); {given}")
        if proprio is not None and proprio.shape != (B, c.proprio_dim):
            raise ValueError(f"proprio must be {(B, c.proprio_dim)}, got {tuple(proprio.shape)}")
        return pixels, task_BD, proprio

    def freeze_untrained(self) -> None:
        """Stop gradients of what the configuration says does not train."""
        if self.config.trainable == "all":
            return
        vision = ("patch_embed", "pos_embed", "class_token", "register_tokens", "vision_blocks")
        action = ("action_tokens", "action_position", "action_blocks", "noisy_action_projector")
        for name, parameter in self.named_parameters():
            top = name.split(".")[0]
            trains = top not in vision if self.config.trainable == "frozen_vision" else top in action
            parameter.requires_grad_(trains)


def _norm_linears(
    x: Tensor, norm: nn.LayerNorm, linears: list[tuple[Tensor, Tensor]], ops: type[TorchOps]
) -> tuple[Tensor, list[Tensor]]:
    return ops.norm_linears(x, norm.weight, norm.bias, norm.eps, linears)
