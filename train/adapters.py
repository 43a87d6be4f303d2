"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates of the vision stream's weights; the rest of it is frozen.

The layers hand their weights, not their modules, to the operators of a backend, so an adapter that replaces a
`Linear`'s forward, as the library peft does, would never be called. Here `weight` itself is `original + scale * up @
down`, by PyTorch's parametrisations: the Triton kernels and the products in PyTorch see it alike, and the number of
its operations is small against a product with all tokens of a batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vat_fast.config import ConfigError
from vat_fast.model import VAT

LINEARS = ("qkv", "proj", "fc1", "fc2")
"""Of a vision block."""


@dataclass(frozen=True)
class LoRAOptions:
    """Low-rank adapters on the vision stream.

    rank: of the updates.
    alpha: their scale is alpha / rank.
    targets: which linears of the vision blocks have one.
    norms: the vision stream's norms and LayerScale train as well.

    Raises:
        ConfigError: a value that cannot be.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LINEARS
    norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ConfigError(f"train.lora.rank must be a whole number of at least 1, got {self.rank!r}")
        if not isinstance(self.alpha, int | float) or not self.alpha > 0:
            raise ConfigError(f"train.lora.alpha must be above 0, got {self.alpha!r}")
        unknown = [name for name in self.targets if name not in LINEARS]
        if unknown or not self.targets:
            raise ConfigError(f"train.lora.targets must be some of {', '.join(LINEARS)}, got {list(self.targets)}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAOptions:
        """From the configuration's mapping.

        Raises:
            ConfigError: an unknown key or a value that cannot be.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown key train.lora.{key}; it has {', '.join(known)}")
        return cls(**values)

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied with."""
        return self.alpha / self.rank


class LowRank(nn.Module):
    """A weight (N, K) -> weight + scale * up (N, R) @ down (R, K); `up` starts at zero, so nothing changes at first."""

    def __init__(self, weight_NK: Tensor, options: LoRAOptions) -> None:
        super().__init__()
        N, K = weight_NK.shape
        self.scale = options.scale
        self.down = nn.Parameter(weight_NK.new_empty(options.rank, K))
        self.up = nn.Parameter(weight_NK.new_zeros(N, options.rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight_NK: Tensor) -> Tensor:
        """(N, K) -> (N, K)."""
        return torch.addmm(weight_NK, self.up.to(weight_NK.dtype), self.down.to(weight_NK.dtype), alpha=self.scale)


def add_lora(vat: VAT, options: LoRAOptions) -> None:
    """Freeze the vision stream in place and put adapters on its linears; the action stream trains as before.

    Call it before the engine is made. Draws from PyTorch's global generator.

    Raises:
        ConfigError: the model has adapters already, or shares its weights between the streams.
    """
    if vat.config.action_stream == "shared":
        raise ConfigError("train.lora needs a vision stream of its own; this model's streams share their weights")
    if has_lora(vat.state_dict()):
        raise ConfigError("this model has low-rank adapters already: merge them first")
    for name, parameter in vat.named_parameters():
        top, *rest = name.split(".")
        if top in ("patch_embed", "pos_embed", "class_token", "register_tokens", "vision_blocks"):
            is_norm = top == "vision_blocks" and rest[1].startswith(("norm", "ls"))
            parameter.requires_grad_(options.norms and is_norm)
    for block in vat.vision_blocks:
        for name in options.targets:
            linear = getattr(block, name, None)  # the last block may be read only through its norm
            if linear is not None:
                parametrize.register_parametrization(linear, "weight", LowRank(linear.weight.detach(), options))


def has_lora(names: Iterable[str]) -> bool:
    """Whether the names of a state dict are those of a model with adapters."""
    return any(name.endswith(".parametrizations.weight.original") for name in names)


def merge_lora(state: Mapping[str, Tensor], options: LoRAOptions) -> dict[str, Tensor]:
    """The plain VAT's state dict from one with adapters, each update added to its weight in float32.

    A state without adapters comes back as it is.

    Raises:
        ValueError: an adapter of which a part is missing.
    """
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        linear, marker, part = name.partition(".parametrizations.weight.")
        if not marker:
            plain[name] = value
        elif part == "original":
            try:
                up, down = (state[f"{linear}{marker}0.{factor}"].float() for factor in ("up", "down"))
            except KeyError as error:
                raise ValueError(f"the adapter of {linear} has no {error.args[0]!r}") from error
            merged = torch.addmm(value.float(), up, down, alpha=options.scale)
            plain[f"{linear}.weight"] = merged.to(value.dtype)
    return plain
