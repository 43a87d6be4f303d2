"""What AdamW is told of each parameter: weight decay, and its share of the learning rate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from vat_fast.model import VAT

_VISION = ("patch_embed", "pos_embed", "class_token", "register_tokens", "vision_blocks")
_EMBEDDINGS = ("pos_embed", "class_token", "register_tokens", "action_tokens", "action_position", "task_embedding")


class GroupOptions(Protocol):
    """The settings read here; `config.TrainSection` has them."""

    @property
    def weight_decay(self) -> float:
        """Of AdamW, for what decays."""

    @property
    def decay_all(self) -> bool:
        """Norms, biases and embeddings decay too, as with the authors."""

    @property
    def layer_decay(self) -> float:
        """Factor on the learning rate from each vision layer to the one before it."""

    @property
    def vision_lr(self) -> float:
        """Factor on the learning rate of the vision stream."""

    @property
    def action_lr(self) -> float:
        """Factor on the learning rate of everything else."""


def parameter_groups(vat: VAT, options: GroupOptions) -> list[dict[str, Any]]:
    """Groups for a PyTorch optimiser, one per pair of weight decay and learning-rate scale.

    The authors' recipe (`decay_all`, every factor 1) gives one group. Frozen parameters are in none of them: a group
    of frozen parameters alone stops ZeRO-1 and 2.

    Args:
        vat: the model, with what is frozen frozen and adapters in place.
        options: weight decay and learning-rate factors.

    Returns:
        Dictionaries with `params`, `weight_decay`, `lr_scale` (what the scheduled rate is multiplied with) and
        `names`, the parameters' names in `vat` in the same order.

    Raises:
        ValueError: nothing trains.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in vat.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = options.weight_decay if options.decay_all or decays(name, parameter) else 0.0
        scale = lr_scale(name, len(vat.vision_blocks), options)
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale, "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    if not groups:
        raise ValueError(f"no parameter of this model trains (trainable is {vat.config.trainable!r})")
    return list(groups.values())


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay makes sense: for weights of products, not for norms, biases, gains and embeddings."""
    # ZeRO-3 empties a parameter; its shape stands beside it.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1 and name.split(".")[0] not in _EMBEDDINGS


def lr_scale(name: str, num_layers: int, options: GroupOptions) -> float:
    """Share of the learning rate of the parameter `name`.

    The last vision layer has `vision_lr`, each one before it `layer_decay` times the next one's, and what makes the
    vision tokens counts as the layer before the first.
    """
    if name.split(".")[0] not in _VISION:
        return options.action_lr
    block = re.match(r"vision_blocks\.(\d+)\.", name)
    layers_above = num_layers - 1 - int(block[1]) if block else num_layers
    return float(options.vision_lr * options.layer_decay**layers_above)


def describe_groups(groups: Sequence[dict[str, Any]]) -> str:
    """One line per group for a log: its parameters, weight decay and share of the learning rate."""
    lines = []
    for group in groups:
        count = sum(getattr(p, "ds_numel", p.numel()) for p in group["params"])
        first, *rest = group["names"]
        examples = first if not rest else f"{first} to {rest[-1]}"
        lines.append(
            f"{count / 1e6:10.3f} M parameters in {len(group['names'])} tensors: weight decay "
            f"{group['weight_decay']:g}, learning rate x {group['lr_scale']:.4g} ({examples})"
        )
    return "\n".join(lines)
