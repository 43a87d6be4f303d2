"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates of the vision stream's weights; the rest of it is frozen.

The adapters are the library peft's. The layers hand weights to the operators of a backend and never call the modules
that peft puts around the linears; `vat_fast.layers.weight_of` reads the updated weight out of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vat_fast.config import ConfigError
from vat_fast.model import VAT

LINEARS = ("qkv", "proj", "fc1", "fc2")
"""Of a vision block."""
_BASE = ".base_layer."
"""Between the name of a linear and that of its own parameter, once peft has put an adapter around it."""


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


def add_lora(vat: VAT, options: LoRAOptions) -> None:
    """Freeze the vision stream in place and put adapters on its linears; the action stream trains as before.

    Call it before the engine is made. Draws from PyTorch's global generator.

    Raises:
        ConfigError: the model has adapters already, shares its weights between the streams or has too few layers, or
            peft is not installed.
    """
    if vat.config.action_stream == "shared":
        raise ConfigError("train.lora needs a vision stream of its own; this model's streams share their weights")
    if has_lora(vat.state_dict()):
        raise ConfigError("this model has low-rank adapters already: merge them first")
    # The last block may be read only through its norm.
    if not any(hasattr(block, name) for block in vat.vision_blocks for name in options.targets):
        raise ConfigError("train.lora has nothing to adapt: of this model's only vision block just the norm runs")
    try:
        # Brings transformers, which takes seconds.
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("train.lora needs the library peft: pip install 'vat_fast[train]'") from error
    trains: dict[nn.Parameter, bool] = {}
    for name, parameter in vat.named_parameters():
        top, *rest = name.split(".")
        if top in ("patch_embed", "pos_embed", "class_token", "register_tokens", "vision_blocks"):
            is_norm = top == "vision_blocks" and rest[1].startswith(("norm", "ls"))
            trains[parameter] = options.norms and is_norm
        else:
            trains[parameter] = parameter.requires_grad
    linears = rf"vision_blocks\.\d+\.({'|'.join(options.targets)})"
    inject_adapter_in_model(LoraConfig(r=options.rank, lora_alpha=options.alpha, target_modules=linears), vat)
    for parameter, flag in trains.items():  # peft has stopped all gradients but the adapters'
        parameter.requires_grad_(flag)


def has_lora(names: Iterable[str]) -> bool:
    """Whether the names of a state dict are those of a model with adapters."""
    return any(_BASE in name for name in names)


def merge_lora(state: Mapping[str, Tensor], options: LoRAOptions) -> dict[str, Tensor]:
    """The plain VAT's state dict from one with adapters, each update added to its weight in float32.

    A state without adapters comes back as it is.

    Raises:
        ValueError: an adapter of which a part is missing.
    """
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name:
            continue
        linear, _, part = name.partition(_BASE)
        if part == "weight":
            try:
                up, down = (state[f"{linear}.{factor}.default.weight"].float() for factor in ("lora_B", "lora_A"))
            except KeyError as error:
                raise ValueError(f"the adapter of {linear} has no {error.args[0]!r}") from error
            plain[f"{linear}.weight"] = torch.addmm(value.float(), up, down, alpha=options.scale).to(value.dtype)
        else:
            plain[name.replace(_BASE, ".")] = value
    return plain
