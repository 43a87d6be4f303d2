"""The configuration of a training run: a YAML file in, `Config` out, and one clear sentence for every mistake.

    model:     which VAT, and the weights it starts from
    data:      demonstrations and how they become batches
    train:     steps, batch, optimiser, precision
    zero:      how DeepSpeed shards the training state
    log:       where numbers go
    validate:  what is measured on held-out episodes
    checkpoint: what is kept

`train/configs/` has commented files. A file may start from another one, `base: other.yaml`, whose keys count where it
has none of its own. `--set train.lr=1e-4` changes one key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from vat_fast.config import PRESETS, ConfigError, VATConfig
from vat_fast.ops import Backend
from vat_fast.train.adapters import LoRAOptions
from vat_fast.train.data.loader import AugmentOn

Precision = Literal["fp32", "autocast", "bf16", "auto"]
Offload = Literal["none", "optimizer", "all"]
StatisticsOf = Literal["own", "first"]
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
class ModelSection:
    """Which VAT is trained.

    preset: of VATConfig.
    weights: where they start. "timm": the backbone's pretrained vision weights, a new action stream; "random"; or
        a checkpoint folder or Hub id to go on from, whose own configuration then counts.
    vision: folder of `vat_fast.train.pretrain` whose weights the vision stream starts from instead; null for none.
    options: VATConfig fields that differ from the preset's, {num_views: 1} for example.
    backend: what computes the layers, see `vat_fast.ops.choose`.
    """

    preset: str = "siglip2-so400m"
    weights: str = "timm"
    vision: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    backend: Backend = "auto"


@dataclass(frozen=True, config=_STRICT)
class DataSection:
    """Demonstrations and how they become batches.

    paths: packed folders, or sources of any format that `vat-fast data pack` reads; those are packed once.
    packed: where sources are packed to, one folder each; None: `data` in the run's folder.
    pack: options of packing, the fields of `PackOptions`.
    weights: share of each path in the mixture; None: every sample once per epoch.
    statistics: what normalises: "own" of each path, as the authors have it for mixtures of robots; "first": those of
        the first path for all, for demonstrations of one robot that came in several rounds.
    cameras: of the views, in the model's order; None: the dataset's first `num_views`.
    holdout: fraction of the episodes kept for validation, chosen by `seed`.
    workers: loader processes per rank; 0 makes batches in the training process.
    prefetch: batches in flight per worker.
    augment: random crop and colours as in the paper.
    augment_on: "cpu" in the workers, "device" batched on the accelerator.
    crop_area: of evaluation's centre crop, what the policy sees; null for none.
    mean, std: of the pixels; None: ImageNet's, as in the released checkpoints.
    policy: fields of the exported `PolicyConfig` that differ from what the data say, {image: {rotation: none}} for
        example.
    synthetic: make LIBERO files at `paths[0]` first where there are none: the fields of `SyntheticOptions`.
    """

    paths: list[str] = field(default_factory=list)
    packed: str | None = None
    pack: dict[str, Any] = field(default_factory=dict)
    weights: list[float] | None = None
    statistics: StatisticsOf = "own"
    cameras: list[str] | None = None
    holdout: float = 0.02
    workers: int = 4
    prefetch: int = 2
    augment: bool = True
    augment_on: AugmentOn = "cpu"
    crop_area: float | None = 0.9
    mean: list[float] | None = None
    std: list[float] | None = None
    policy: dict[str, Any] = field(default_factory=dict)
    synthetic: dict[str, Any] | None = None


@dataclass(frozen=True, config=_STRICT)
class TrainSection:
    """Steps, batch, optimiser, precision.

    steps, epochs: the run's length; exactly one of them is given.
    global_batch: samples per optimiser step, over all ranks: micro_batch * accumulation * ranks.
    micro_batch: samples per rank and forward; None: what global batch, accumulation and ranks leave.
    accumulation: forwards per optimiser step; None: what the other three leave, 1 without `micro_batch`.
    lr: the peak learning rate.
    warmup: fraction of the steps over which it rises.
    final_lr: where the cosine ends.
    weight_decay, beta1, beta2, eps: of AdamW.
    decay_all: also decay norms, biases and embeddings.
    layer_decay: factor on the learning rate from each vision layer to the one before it; 1 for none.
    vision_lr, action_lr: factors on the learning rate of the two streams.
    clip: largest norm of the whole gradient; null for no clipping.
    precision: "fp32"; "autocast": float32 parameters, products in bfloat16, the authors'; "bf16": bfloat16
        parameters with a float32 copy in the optimiser; "auto": "autocast" where the device multiplies bfloat16
        itself, else "fp32", which is faster there.
    recompute: activation checkpointing: less memory, a third more time.
    compile: torch.compile the model.
    ema: decay of the moving average of the weights, 0.999 for example; null for none.
    lora: rank, alpha and targets of low-rank adapters on the vision stream; null for none.
    proprio_dropout: share of the samples whose proprioception is hidden (zeros): what is seen must do.
    proprio_noise: standard deviation of noise on proprioception, in its normalised units.
    deterministic: PyTorch's deterministic algorithms, and no autotuning.
    threads: of each rank on a CPU; None: cores / ranks.
    """

    steps: int | None = None
    epochs: float | None = None
    global_batch: int = 128
    micro_batch: int | None = None
    accumulation: int | None = None
    lr: float = 2e-5
    warmup: float = 0.1
    final_lr: float = 1e-7
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    decay_all: bool = True
    layer_decay: float = 1.0
    vision_lr: float = 1.0
    action_lr: float = 1.0
    clip: float | None = None
    precision: Precision = "autocast"
    recompute: bool = False
    compile: bool = False
    ema: float | None = None
    lora: dict[str, Any] | None = None
    proprio_dropout: float = 0.0
    proprio_noise: float = 0.0
    deterministic: bool = False
    threads: int | None = None


@dataclass(frozen=True, config=_STRICT)
class ZeroSection:
    """How DeepSpeed shards the training state over the ranks.

    stage: 0 nothing, 1 optimiser state, 2 gradients too, 3 parameters too.
    offload: what waits in the host's memory: "none", the "optimizer" state, or "all" (parameters too, stage 3).
    overlap: communicate during the backward.
    bucket: elements per message.
    """

    stage: int = 1
    offload: Offload = "none"
    overlap: bool = True
    bucket: int = 200_000_000


@dataclass(frozen=True, config=_STRICT)
class LogSection:
    """Where numbers go.

    every: steps between two lines.
    tensorboard: write TensorBoard event files into the run's folder.
    wandb: Weights & Biases project, or null.
    """

    every: int = 10
    tensorboard: bool = True
    wandb: str | None = None


@dataclass(frozen=True, config=_STRICT)
class ValidateSection:
    """What is measured on held-out episodes.

    every: steps between two validations; the last step has one too. None: none.
    samples: held-out samples per dataset at most, evenly spread; None: all.
    batch: samples per rank and forward; None: the training's micro batch.
    rollout: LIBERO episodes in simulation at every validation, the arguments of `vat_fast.rollout`; null: none.
    """

    every: int | None = 1000
    samples: int | None = 2048
    batch: int | None = None
    rollout: dict[str, Any] | None = None


@dataclass(frozen=True, config=_STRICT)
class CheckpointSection:
    """What is kept.

    every: steps between two checkpoints; the last step has one too. None: only the last.
    keep_last: newest checkpoints kept.
    keep_every: steps whose multiples are kept for good; None: no others.
    on_failure: what training does when a checkpoint cannot be written, "continue" or "stop".
    export: write the policy folder at the end.
    released: write it in the authors' layout too.
    """

    every: int | None = 1000
    keep_last: int = 2
    keep_every: int | None = None
    on_failure: Literal["continue", "stop"] = "stop"
    export: bool = True
    released: bool = False


@dataclass(frozen=True, config=_STRICT)
class Config:
    """One training run.

    output: the run's folder: logs, checkpoints, the exported policy.
    seed: of weights, order of the data, augmentation and split.
    """

    output: str
    seed: int = 42
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    zero: ZeroSection = field(default_factory=ZeroSection)
    log: LogSection = field(default_factory=LogSection)
    validate: ValidateSection = field(default_factory=ValidateSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def accumulation(self) -> int:
        """Forwards per optimiser step; known once the configuration is resolved."""
        assert self.train.accumulation is not None, "resolve(world_size) comes first"
        return self.train.accumulation

    @property
    def micro_batch(self) -> int:
        """Samples per rank and forward; known once the configuration is resolved."""
        assert self.train.micro_batch is not None, "resolve(world_size) comes first"
        return self.train.micro_batch

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """The fields as YAML, which `load_config` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def resolve(self, world_size: int, device: str = "cpu") -> Config:
        """The same run with every batch size decided for so many ranks, and precision "auto" for their device.

        Raises:
            ConfigError: the batch sizes do not multiply to the global batch.
        """
        t = self.train
        share, rest = divmod(t.global_batch, world_size)
        if rest:
            raise ConfigError(f"train.global_batch {t.global_batch} is not a multiple of the {world_size} ranks")
        micro, accumulation = t.micro_batch, t.accumulation
        if micro is None:
            accumulation = accumulation or 1
            micro = share // accumulation
        elif accumulation is None:
            accumulation = share // micro
        if micro * accumulation != share or micro < 1:
            raise ConfigError(
                f"train.global_batch {t.global_batch} must be micro_batch {micro} x accumulation {accumulation} x "
                f"{world_size} ranks, which is {micro * accumulation * world_size}"
            )
        precision = t.precision
        if precision == "auto":
            from vat_fast.precision import multiplies_bfloat16

            precision = "autocast" if multiplies_bfloat16(device) else "fp32"
        train = dataclasses.replace(t, micro_batch=micro, accumulation=accumulation, precision=precision)
        return dataclasses.replace(self, train=train)


def load_config(path: str | Path, changes: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, with single keys changed.

    Args:
        path: YAML file.
        changes: `section.key=value` each, the value as YAML.

    Raises:
        ConfigError: not YAML, an unknown key, a value of the wrong type or one that cannot be.
        FileNotFoundError: no such file.
    """
    values = _read(Path(path))
    for change in changes:
        _set(values, change)
    try:
        return config_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration that `Config.to_dict` gave, or part of one: what is missing takes its default.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or one that cannot be.
    """
    try:
        # Strict about types, pydantic takes a section's values from JSON alone.
        return _ADAPTER.validate_json(json.dumps(dict(values), default=str))
    except ValidationError as error:
        raise ConfigError("; ".join(_sentence(entry) for entry in error.errors())) from error


_ADAPTER = TypeAdapter(Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: PyYAML alone takes 1e-4 for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*([eE][-+]?\d+)|\d[\d_]*\.\d*|\.\d+([eE][-+]?\d+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def _read(path: Path) -> dict[str, Any]:
    """A YAML file, on top of the one it names as its `base`."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections such as model, data and train, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the name of another file, got {base!r}")
    below = _read(path.parent / base)
    for name, value in values.items():
        # Sections are merged key by key, everything below them is replaced.
        both = isinstance(value, dict) and isinstance(below.get(name), dict)
        below[name] = {**below[name], **value} if both else value
    return below


def _set(values: dict[str, Any], change: str) -> None:
    """Put `section.key=value` into nested dictionaries."""
    key, equals, text = change.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not name:
        raise ConfigError(f"--set takes section.key=value, got {change!r}")
    for section in sections:
        inner = values.get(section)
        values[section] = inner = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change}: {section} is no section")
        values = inner
    try:
        values[name] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {change}: the value is not YAML") from error


def _sentence(error: Any) -> str:
    """One of pydantic's findings as: what was given, what was expected."""
    place = [str(part) for part in error["loc"]]
    name = ".".join(place)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields(place[:-1])
        close = difflib.get_close_matches(place[-1], known, n=1)
        hint = f" (did you mean {'.'.join([*place[:-1], close[0]])}?)" if close else ""
        return f"unknown key {name}{hint}; {'.'.join(place[:-1]) or 'the file'} has {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    expected = error["msg"].replace("Input should be ", "must be ").replace("Input must be", "must be")
    return f"{name} {expected}, got {error['input']!r}"


def _fields(place: Sequence[str]) -> list[str]:
    kind: Any = Config
    for name in place:
        kind = get_type_hints(kind).get(name, kind)
    return [entry.name for entry in dataclasses.fields(kind)]


def _check(config: Config) -> None:
    """Raise one ConfigError for the first value that cannot be, alone or beside another."""
    c, m, d, t, z, v, k = (
        config,
        config.model,
        config.data,
        config.train,
        config.zero,
        config.validate,
        config.checkpoint,
    )
    if m.weights in ("timm", "random"):
        if m.preset not in PRESETS:
            close = difflib.get_close_matches(m.preset, PRESETS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(f"model.preset {m.preset!r} is unknown{hint}; presets are {', '.join(PRESETS)}")
        try:
            VATConfig.from_preset(m.preset, **m.options)
        except ConfigError as error:
            raise ConfigError(f"model.options: {error}") from error
    if t.lora is not None:
        LoRAOptions.from_dict(t.lora)
    at_least_one = {
        "train.steps": t.steps,
        "train.global_batch": t.global_batch,
        "train.micro_batch": t.micro_batch,
        "train.accumulation": t.accumulation,
        "train.threads": t.threads,
        "data.prefetch": d.prefetch,
        "zero.bucket": z.bucket,
        "log.every": c.log.every,
        "validate.every": v.every,
        "validate.samples": v.samples,
        "validate.batch": v.batch,
        "checkpoint.every": k.every,
        "checkpoint.keep_last": k.keep_last,
        "checkpoint.keep_every": k.keep_every,
    }
    for name, count in at_least_one.items():
        if count is not None and count < 1:
            raise ConfigError(f"{name} must be at least 1 (or null), got {count}")
    ranges = [
        ("data.workers", d.workers, d.workers >= 0, "at least 0"),
        ("seed", c.seed, c.seed >= 0, "at least 0"),
        ("data.holdout", d.holdout, 0 <= d.holdout < 1, "at least 0 and below 1"),
        ("data.crop_area", d.crop_area, d.crop_area is None or 0 < d.crop_area <= 1, "above 0 and at most 1"),
        ("train.epochs", t.epochs, t.epochs is None or t.epochs > 0, "above 0"),
        ("train.lr", t.lr, t.lr > 0, "above 0"),
        ("train.final_lr", t.final_lr, 0 <= t.final_lr <= t.lr, f"from 0 to train.lr {t.lr}"),
        ("train.warmup", t.warmup, 0 <= t.warmup < 1, "at least 0 and below 1"),
        ("train.weight_decay", t.weight_decay, t.weight_decay >= 0, "at least 0"),
        ("train.beta1", t.beta1, 0 <= t.beta1 < 1, "at least 0 and below 1"),
        ("train.beta2", t.beta2, 0 <= t.beta2 < 1, "at least 0 and below 1"),
        ("train.eps", t.eps, t.eps > 0, "above 0"),
        ("train.layer_decay", t.layer_decay, 0 < t.layer_decay <= 1, "above 0 and at most 1"),
        ("train.vision_lr", t.vision_lr, t.vision_lr > 0, "above 0 (model.options.trainable freezes)"),
        ("train.action_lr", t.action_lr, t.action_lr > 0, "above 0"),
        ("train.clip", t.clip, t.clip is None or t.clip > 0, "above 0, or null for none"),
        ("train.proprio_dropout", t.proprio_dropout, 0 <= t.proprio_dropout < 1, "at least 0 and below 1"),
        ("train.proprio_noise", t.proprio_noise, t.proprio_noise >= 0, "at least 0"),
        ("train.ema", t.ema, t.ema is None or 0 < t.ema < 1, "above 0 and below 1, or null for none"),
        ("zero.stage", z.stage, z.stage in (0, 1, 2, 3), "0, 1, 2 or 3"),
    ]
    for name, value, fits, expected in ranges:
        if not fits or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(f"{name} must be {expected}, got {value}")
    for name, colour in (("data.mean", d.mean), ("data.std", d.std)):
        if colour is not None and len(colour) != 3:
            raise ConfigError(f"{name} must be three numbers, one per channel, got {colour}")
    together = [
        (
            (t.steps is None) == (t.epochs is None),
            f"exactly one of train.steps and train.epochs must be given, got {t.steps} and {t.epochs}",
        ),
        (not d.paths, "data.paths must name at least one dataset"),
        (
            d.weights is not None and len(d.weights) != len(d.paths),
            f"data.weights must have one number per path, got {len(d.weights or [])} for {len(d.paths)}",
        ),
        (
            d.augment_on == "device" and not d.augment,
            "data.augment_on 'device' needs data.augment true: without augmentation images are made on the CPU",
        ),
        (
            z.stage == 0 and t.precision == "bf16",
            "zero.stage 0 with train.precision 'bf16' is wrong in DeepSpeed (its update lags by a step): use stage 1, "
            "or precision 'autocast'",
        ),
        (
            z.offload == "optimizer" and z.stage == 0,
            "zero.offload 'optimizer' needs zero.stage 1, 2 or 3: stage 0 keeps the whole state on every rank",
        ),
        (z.offload == "all" and z.stage != 3, f"zero.offload 'all' needs zero.stage 3, got {z.stage}"),
        (
            t.compile and z.stage == 3 and t.recompute,
            "train.compile with train.recompute at zero.stage 3 is not supported: leave one of them out",
        ),
        (
            v.rollout is not None and v.every is None,
            "validate.rollout runs at every validation: set validate.every",
        ),
        (
            v.every is not None and d.holdout == 0 and v.rollout is None,
            "validation needs held-out episodes: set data.holdout above 0, or validate.every null",
        ),
    ]
    for is_wrong, message in together:
        if is_wrong:
            raise ConfigError(message)
