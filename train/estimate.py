"""What training will need, before it starts: bytes on each rank, operations, and a time no step can be faster than.

What the forward keeps for the backward is not a formula: the model's own forward runs on tensors without storage and
what autograd saves is counted. The rest follows from how DeepSpeed shards Adam's state.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from vat_fast.config import PRESETS, ConfigError, VATConfig
from vat_fast.cost import forward_cost
from vat_fast.kernels.static_model import DEVICES
from vat_fast.model import VAT
from vat_fast.train.adapters import LoRAOptions, add_lora
from vat_fast.train.config import Offload, Precision
from vat_fast.without_values import without_values

Kind = Literal["gpu", "cpu"]

_PRECISIONS = tuple(name for name in get_args(Precision) if name != "auto")

_MESSAGE, _LIVE = 500_000_000, 1_000_000_000
"""Defaults of DeepSpeed: elements of a message at stage 0, and of parameters that stage 3 keeps gathered."""


@dataclass(frozen=True)
class TrainingPlan:
    """How a model is trained.

    ranks: GPUs or processes.
    zero: DeepSpeed's stage.
    micro_batch: samples per rank and forward.
    accumulation: forwards per optimiser step.
    precision, recompute, offload: as in `config.TrainSection` and `ZeroSection`.
    lora: adapters on the vision stream.
    ema: a moving average of the weights is kept.
    bucket: elements per message between ranks.
    kind: where it runs; on a CPU in bfloat16, attention keeps its maps for the backward.

    Raises:
        ConfigError: a number below 1, an unknown word, or a combination that DeepSpeed does not have.
    """

    ranks: int = 1
    zero: int = 1
    micro_batch: int = 32
    accumulation: int = 1
    precision: Precision = "autocast"
    recompute: bool = False
    offload: Offload = "none"
    lora: LoRAOptions | None = None
    ema: bool = False
    bucket: int = 200_000_000
    kind: Kind = "gpu"

    def __post_init__(self) -> None:
        for name in ("ranks", "micro_batch", "accumulation", "bucket"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        choices: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("zero", (0, 1, 2, 3)),
            ("precision", _PRECISIONS),
            ("offload", get_args(Offload)),
            ("kind", get_args(Kind)),
        )
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(self, name)!r}")
        if (self.offload == "optimizer" and self.zero == 0) or (self.offload == "all" and self.zero != 3):
            raise ConfigError(f"offload {self.offload!r} needs a higher ZeRO stage than {self.zero}")


@dataclass(frozen=True)
class Estimate:
    """What one rank needs; everything in bytes but the counts.

    total_parameters, trained_parameters: of the model, adapters included.
    parameters, gradients, optimizer, ema: on the device. `optimizer` holds Adam's two moments and, with ZeRO or
        bfloat16 weights, the float32 copy that is stepped.
    activations: what the forward of one micro batch keeps for its backward, casts of weights included.
    buffers: messages between ranks, for which one rank has room too, and with ZeRO-3 the parameters that are gathered:
        DeepSpeed keeps those that it will need again within its limit, which is most models' whole size.
    host: of what is offloaded.
    flops: of this rank for one optimiser step.
    sent: bytes this rank sends for one optimiser step.
    step_seconds: a lower bound for each known device: all products at the vendor's dense bf16 rate, or all memory
        traffic that cannot be avoided at full bandwidth, whichever is longer. No prediction.
    """

    plan: TrainingPlan
    total_parameters: int
    trained_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    buffers: int
    host: int
    flops: float
    sent: int
    step_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def device_total(self) -> int:
        """Bytes on the device of one rank."""
        return self.parameters + self.gradients + self.optimizer + self.ema + self.activations + self.buffers

    def to_dict(self) -> dict[str, Any]:
        """All fields and `device_total` as plain numbers."""
        return {**dataclasses.asdict(self), "device_total": self.device_total}

    def text(self) -> str:
        """A table for people."""
        p, gib = self.plan, 2.0**30
        lines = [
            f"{self.total_parameters / 1e6:,.1f} M parameters, {self.trained_parameters / 1e6:,.1f} M of them train; "
            f"{p.ranks} ranks, ZeRO-{p.zero}, {p.precision}, {p.micro_batch} x {p.accumulation} samples a rank",
            "on each rank, GiB (1 GiB = 2^30 bytes):",
        ]
        for name in ("parameters", "gradients", "optimizer", "ema", "activations", "buffers"):
            lines.append(f"  {name:14}{getattr(self, name) / gib:10.2f}")
        lines.append(f"  {'sum':14}{self.device_total / gib:10.2f}")
        if self.host:
            lines.append(f"  {'in host memory':14}{self.host / gib:10.2f}")
        lines.append(f"each rank computes {self.flops / 1e12:,.2f} TFLOP a step and sends {self.sent / 1e9:,.2f} GB")
        if self.step_seconds:
            lines.append("no step is faster than this (a bound, not a prediction; messages between ranks left out):")
            samples = p.ranks * p.micro_batch * p.accumulation
            lines += [
                f"  {name:8}{1e3 * seconds:10.1f} ms, {samples / seconds:10,.0f} samples/s"
                for name, seconds in self.step_seconds.items()
            ]
        return "\n".join(lines)


def estimate(config: VATConfig, plan: TrainingPlan) -> Estimate:
    """What training a model of this configuration needs.

    Raises:
        ConfigError: adapters where there can be none.
    """
    with without_values():
        vat = _build(config, plan)
    total = sum(p.numel() for p in vat.parameters())
    trained = sum(p.numel() for p in vat.parameters() if p.requires_grad)
    n, stage = plan.ranks, plan.zero
    width = 2 if plan.precision == "bf16" else 4
    parameters = width * total // (n if stage == 3 else 1)
    gradients = width * trained // (n if stage >= 2 else 1)
    # Two moments; ZeRO steps a float32 copy of its share, and has that share's gradient in float32.
    optimizer = 8 * trained if stage == 0 else (8 + 4 + 4) * trained // n
    ema = 4 * trained // n if plan.ema else 0
    host = 0
    if plan.offload != "none":
        host, optimizer = optimizer, 0
    if plan.offload == "all":
        host, parameters = host + parameters, 0
    activations = activation_bytes(config, plan)
    samples = plan.micro_batch * plan.accumulation
    hardware = samples * (training_flops(config, plan.lora) + (forward_flops(config) if plan.recompute else 0.0))
    share = {0: 2.0, 1: 2.0, 2: 2.0, 3: 3.0}[stage] * (n - 1) / n
    # Read by forward and backward, gradients written and read; the optimiser reads and writes its state; activations
    # are written and read once.
    update = 4 * 2 * 3 * trained // (1 if stage == 0 else n)
    traffic = plan.accumulation * (2 * width * total + 2 * width * trained + 2 * activations) + update
    bounds = {
        name: max(hardware / (part.tflops * 1e12), traffic / (part.bandwidth * 1e9)) for name, part in DEVICES.items()
    }
    return Estimate(
        plan=plan,
        total_parameters=total,
        trained_parameters=trained,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        ema=ema,
        activations=activations,
        buffers=_buffer_bytes(plan, total, trained),
        host=host,
        flops=hardware,
        sent=int(share * width * trained),
        step_seconds=bounds if plan.kind == "gpu" and plan.precision != "fp32" else {},
    )


def forward_flops(config: VATConfig) -> float:
    """Operations of one forward of one sample in training: a diffusion head runs once, not once per denoising step."""
    cost = forward_cost(config)
    rounds = config.diffusion_steps if config.head == "diffusion" else 1
    return cost.patch_embed + cost.vision + (cost.film + cost.action + cost.head) / rounds


def training_flops(config: VATConfig, lora: LoRAOptions | None = None) -> float:
    """Operations of training on one sample, without any that are computed twice.

    A backward costs a forward for the weights' gradients and one for the inputs'. A frozen vision stream has neither;
    its keys and values for the action stream have the weights'; with adapters it has the inputs'.
    """
    forward, cost = forward_flops(config), forward_cost(config)
    vision = cost.patch_embed + cost.vision
    if lora is not None:
        return 3 * forward - vision
    if config.trainable == "all":
        return 3 * forward
    memories = 0
    if config.action_stream != "shared":
        memories = config.layers * config.num_keys * 4 * config.width * config.action_width
    return 3 * forward - 2 * vision + memories


def activation_bytes(config: VATConfig, plan: TrainingPlan) -> int:
    """What the forward of one micro batch keeps for its backward.

    With `recompute` that is what enters each layer, and everything of one layer while its backward runs. On GPUs the
    count is for PyTorch's operators; the Triton kernels keep less.
    """
    # Layers between the first and the last are alike: four and five of them tell what one more keeps.
    known = min(config.layers, 4)
    shallow = config.replace(depth=config.depth - config.layers + known, num_layers=known)
    everything = _saved_bytes(shallow, plan)
    layer = _saved_bytes(shallow.replace(depth=shallow.depth + 1, num_layers=known + 1), plan) - everything
    everything += (config.layers - known) * layer
    if not plan.recompute:
        return everything
    B, wide = plan.micro_batch, 2 if plan.precision == "bf16" else 4
    narrow = 4 if plan.precision == "fp32" else 2
    vision = B * config.num_views * config.tokens_per_view * (wide * config.width + narrow * 2 * config.action_width)
    action = B * (config.num_action_tokens + config.num_extra_tokens) * wide * config.action_width
    return config.layers * (vision + action) + layer


def _buffer_bytes(plan: TrainingPlan, total: int, trained: int) -> int:
    """Of DeepSpeed's messages, and of parameters that ZeRO-3 has gathered."""
    width = 2 if plan.precision == "bf16" else 4
    if plan.zero == 0:
        return width * min(_MESSAGE, trained)
    # Two buckets take turns. A GPU's memory is taken when it is asked for, a CPU's when it is written to.
    buckets = (1 if plan.zero == 3 else 2) * plan.bucket
    elements = min(buckets, trained) if plan.kind == "cpu" else buckets
    if plan.zero == 3:
        return width * (elements + min(_LIVE, total))
    return (4 if plan.zero == 1 else width) * elements


def _build(config: VATConfig, plan: TrainingPlan) -> VAT:
    vat = VAT(config)
    if plan.lora is not None:
        add_lora(vat, plan.lora)
    return vat.to(torch.bfloat16) if plan.precision == "bf16" else vat


def _saved_bytes(config: VATConfig, plan: TrainingPlan) -> int:
    """Bytes of all storages, parameters left out, that autograd holds after the forward of one micro batch."""
    # float16 has bfloat16's size, and attention keeps no maps for it, as on a GPU.
    half = torch.bfloat16 if plan.kind == "cpu" else torch.float16
    with without_values():
        vat = _build(config, plan)
        if plan.precision == "bf16":
            vat = vat.to(half)
    with FakeTensorMode(allow_non_fake_inputs=True):
        vat = vat.to_empty(device="cpu")
        if plan.kind == "gpu":
            vat.backend = "torch"  # not what a CPU would run
        return saved_bytes(vat, plan.micro_batch, half if plan.precision == "autocast" else None)


def saved_bytes(vat: VAT, batch: int, autocast: torch.dtype | None = None) -> int:
    """What autograd holds after one forward of a model with an L1 or diffusion loss, its parameters left out.

    Args:
        vat: on a CPU, or built within a `FakeTensorMode` that is active.
        batch: samples.
        autocast: dtype of products, or None.
    """
    c, dtype = vat.config, vat.pos_embed.dtype
    own = {p.untyped_storage()._cdata for p in vat.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return tensor

    pixels = torch.zeros(batch, c.num_views, 3, c.image_size, c.image_size, dtype=dtype)
    ids = torch.zeros(batch, dtype=torch.int64)
    actions = torch.zeros(batch, c.chunk_size, c.action_dim, dtype=dtype)
    proprio = torch.zeros(batch, c.proprio_dim, dtype=dtype) if c.proprio_dim else None
    noisy = (actions, ids) if c.head == "diffusion" else ()
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", autocast, enabled=bool(autocast)):
        # The steps of VAT.predict, whose check of the task ids reads values that a fake tensor has not.
        task_BD = None if vat.task_embedding is None else vat.task_embedding(ids)
        tokens = vat.action_stream(vat.vision_stream(pixels), task_BD, proprio, *noisy)
        loss = (vat.head(tokens).float() - actions).abs().mean()
    size = sum(storage.nbytes() for storage in kept.values())
    del loss
    return size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `vat-fast explain --train`."""
    parser.add_argument("--gpus", type=int, default=1, help="ranks (default 1)")
    parser.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3), help="DeepSpeed's ZeRO stage (default 1)")
    parser.add_argument("--micro-batch", type=int, default=32, help="samples per rank and forward (default 32)")
    parser.add_argument("--accumulation", type=int, default=1, help="forwards per optimiser step (default 1)")
    parser.add_argument("--precision", default="autocast", choices=_PRECISIONS)
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--offload", default="none", choices=get_args(Offload))
    parser.add_argument("--lora", type=int, metavar="RANK", help="low-rank adapters on the vision stream")
    parser.add_argument("--ema", action="store_true", help="with a moving average of the weights")


def report(args: argparse.Namespace) -> str:
    """What `vat-fast explain --train` prints: of `add_arguments`' options, `preset`, and `json`, `views` if there.

    Raises:
        ConfigError: options that do not go together.
    """
    if args.preset not in PRESETS:
        raise ConfigError(f"preset {args.preset!r} is unknown; presets are {', '.join(PRESETS)}")
    config = VATConfig.from_preset(args.preset)
    if getattr(args, "views", None) is not None:
        config = config.replace(num_views=args.views)
    plan = TrainingPlan(
        ranks=args.gpus,
        zero=args.zero,
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        precision=args.precision,
        recompute=args.recompute,
        offload=args.offload,
        lora=None if args.lora is None else LoRAOptions(rank=args.lora, alpha=2.0 * args.lora),
        ema=args.ema,
    )
    found = estimate(config, plan)
    return json.dumps(found.to_dict(), indent=2) if getattr(args, "json", False) else found.text()
