"""From the configuration to a model, and to the DeepSpeed engine that trains it."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor

from vat_fast.config import ConfigError, VATConfig
from vat_fast.model import VAT
from vat_fast.ops import choose
from vat_fast.train.config import Config
from vat_fast.train.deepspeed_config import deepspeed_config
from vat_fast.train.step import TrainingModel
from vat_fast.vision_weights import load_vision


def build_model(config: Config) -> VAT:
    """The VAT a run starts from, float32, on the CPU; the same on every rank, by the seed.

    Raises:
        ConfigError: options that do not go with a checkpoint.
        BackboneError: the pretrained weights cannot be had.
        CheckpointError: vision weights of another shape.
    """
    m = config.model
    torch.manual_seed(config.seed)
    if m.weights == "timm":
        vat = VAT.from_timm(m.preset, pretrained=True, **m.options)
    elif m.weights == "random":
        vat = VAT(VATConfig.from_preset(m.preset, **m.options))
    else:
        vat = _from_checkpoint(m.weights, m.options)
    if m.vision is not None:
        load_vision(vat, m.vision)
    vat.backend = m.backend
    vat.recompute_layers = config.train.recompute
    return vat.train()


def build_engine(config: Config, vat: VAT, groups: list[dict[str, Any]]) -> Any:
    """The DeepSpeed engine around a model, with AdamW on `groups`; `engine.module` is the `TrainingModel`.

    Call `launch.start` first.
    """
    t = config.train
    autocast = torch.bfloat16 if t.precision == "autocast" else None
    model = TrainingModel(vat, autocast, t.proprio_dropout, t.proprio_noise)
    optimizer = torch.optim.AdamW(
        groups, lr=t.lr, betas=(t.beta1, t.beta2), eps=t.eps, weight_decay=t.weight_decay, fused=True
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config))
    if t.compile:
        engine.compile()
    return engine


def describe_backend(vat: VAT, device: torch.device) -> str:
    """What computes the layers on this device, and why: one line for the log."""
    choice = choose(vat.backend, device)
    return f"layers run on {choice.ops.name} ({choice.reason})"


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give every group its share (`lr_scale`) of the learning rate."""
    for group in optimizer.param_groups:
        value = rate * group.get("lr_scale", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def _from_checkpoint(name: str, options: dict[str, Any]) -> VAT:
    extra = sorted(set(options) - {"trainable"})
    if extra:
        raise ConfigError(
            f"model.weights {name!r} brings its own architecture: model.options may hold trainable alone, "
            f"got {', '.join(extra)}"
        )
    vat = VAT.from_pretrained(name, dtype=torch.float32)
    if options:
        vat.config = vat.config.replace(**options)
    vat.requires_grad_(True)
    vat.freeze_untrained()
    return vat
