"""Train a blind policy: what proprioception and the task's name alone can learn from packed demonstrations.

    python -m vat_fast.train.blind packed/object --out runs/blind
    vat-fast eval runs/blind --suite object --out runs/blind_object

Targets, statistics and held-out episodes are those of a VAT that is trained on the same folders with the same seed;
images are never read. OUT is a folder that `BlindPolicy.from_pretrained` and `vat-fast eval` load,
with `blind_training.json` beside the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from vat_fast.config import ConfigError
from vat_fast.files import write_text
from vat_fast.rollout.blind import BlindConfig, BlindPolicy
from vat_fast.rollout.conditions import conditions
from vat_fast.train.config import DataSection, ValidateSection
from vat_fast.train.data.mixture import Mixture, merge_tasks
from vat_fast.train.data.packed import PackedDataset
from vat_fast.train.data.targets import Samples, held_out
from vat_fast.train.datasets import thinned
from vat_fast.train.ema import MovingAverage
from vat_fast.train.metrics import ActionErrors, ErrorTable
from vat_fast.train.schedule import learning_rate

TRAINING_FILE = "blind_training.json"
_EVALUATED_AT_ONCE = 4096


@dataclass(frozen=True)
class BlindSettings:
    """What is trained, and how.

    paths: packed folders; the policy acts with the statistics of the first, as a VAT's does.
    steps, batch: of training.
    lr, weight_decay: of AdamW; the rate rises over the fraction `warmup` of the steps, then falls as a cosine.
    ema: decay of the moving average of the weights, which is the policy.
    hidden, chunk: see `BlindConfig`.
    task: whether the policy is told the task; without, its task embedding stays zero.
    proprio_noise: standard deviation of noise on proprioception, in its normalised units.
    weights: share of each folder in the mixture; None: every sample once per epoch.
    holdout: fraction of the episodes kept for measuring, chosen by `seed` as for a VAT.
    replan_every, temporal_ensembling: how the policy executes its chunks, see `PolicyConfig`.
    seed: of weights, order, noise and split.

    Raises:
        ConfigError: an impossible value.
    """

    paths: tuple[str, ...]
    steps: int = 6000
    batch: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    ema: float = 0.999
    hidden: int = 256
    chunk: int = 8
    task: bool = True
    proprio_noise: float = 0.0
    weights: tuple[float, ...] | None = None
    holdout: float = DataSection.holdout
    replan_every: int | None = None
    temporal_ensembling: float | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("there is nothing to train on: name at least one packed folder")
        for name, least in (("steps", 1), ("batch", 1), ("chunk", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        for name in ("weight_decay", "proprio_noise"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup must be a fraction from 0 to below 1, got {self.warmup}")
        if not 0 < self.ema < 1:
            raise ConfigError(f"ema must be above 0 and below 1, got {self.ema}")


def train_blind(settings: BlindSettings, out: Path, *, progress: bool = True) -> dict[str, Any]:
    """Train, and write the policy and `blind_training.json` into `out`; returns what that file holds.

    The same settings give the same weights on the same machine with the same number of threads.

    Raises:
        DataError: folders that cannot be read, do not fit together, or have no sample or no episode to hold out.
        ConfigError: data without proprioception, or that do not fit one policy.
    """
    datasets = [PackedDataset(path) for path in settings.paths]
    _check_fit(datasets)
    trained, measured = _split(datasets, settings)
    policy = _new_policy(datasets, settings)
    started = time.perf_counter()
    with _fit(policy, trained, settings, progress).applied():
        seconds = time.perf_counter() - started
        figures = {
            "train": _measure(policy, dict(zip((data.name for data in datasets), trained, strict=True))),
            "held_out": _measure(policy, measured),
        }
        summary = {
            "command": " ".join(sys.argv),
            "settings": dataclasses.asdict(settings),
            "data": {data.name: {"fingerprint": data.fingerprint, "episodes": len(data.episodes)} for data in datasets},
            **{f"{name}_l1": _mean_l1(tables) for name, tables in figures.items()},
            **{name: {key: _to_dict(table) for key, table in tables.items()} for name, tables in figures.items()},
            "seconds": round(seconds, 1),
            "conditions": conditions(),
        }
        write_text(out / TRAINING_FILE, json.dumps(summary, indent=2) + "\n")
        policy.save_pretrained(out)
    return summary


def _check_fit(datasets: Sequence[PackedDataset]) -> None:
    """Raise one ConfigError for the first thing that one blind policy cannot learn from."""
    first, names = datasets[0], [data.name for data in datasets]
    for data in datasets:
        if data.state is None or data.statistics.proprio is None:
            raise ConfigError(
                f"{data.path} has no proprioception, and a blind policy reads nothing else: pack it with --state"
            )
        if names.count(data.name) > 1:
            raise ConfigError(f"two datasets are called {data.name!r}; pack one of them under another name (--name)")
        assert first.state is not None
        for what, here, there in (
            ("actions of", data.actions.shape[1], first.actions.shape[1]),
            ("proprioception of", data.state.shape[1], first.state.shape[1]),
            ("gripper convention", data.gripper, first.gripper),
        ):
            if here != there:
                raise ConfigError(
                    f"{data.path} has {what} {here}, {first.path} {there}: one policy has one; train on them apart"
                )


def _split(datasets: Sequence[PackedDataset], settings: BlindSettings) -> tuple[list[Samples], dict[str, Samples]]:
    """Training samples of each dataset, and by its name the held-out ones that a VAT's validation has by default."""
    trained, measured = [], {}
    for data in datasets:
        out = held_out([entry.name for entry in data.episodes], settings.holdout, settings.seed)
        trained.append(Samples(data, settings.chunk, episodes=~out))
        if out.any():
            measured[data.name] = thinned(Samples(data, settings.chunk, episodes=out), ValidateSection.samples)
    return trained, measured


def _new_policy(datasets: Sequence[PackedDataset], settings: BlindSettings) -> BlindPolicy:
    first = datasets[0]
    assert first.state is not None
    config = BlindConfig(
        merge_tasks([data.tasks for data in datasets]),
        chunk_size=settings.chunk,
        action_dim=first.actions.shape[1],
        proprio_dim=first.state.shape[1],
        hidden=settings.hidden,
        gripper=first.gripper,
        replan_every=settings.replan_every,
        temporal_ensembling=settings.temporal_ensembling,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        policy = BlindPolicy(config, first.statistics)
    if not settings.task:
        policy.task_embedding.weight.requires_grad_(False).zero_()
    return policy


def _fit(policy: BlindPolicy, trained: Sequence[Samples], settings: BlindSettings, progress: bool) -> MovingAverage:
    """Train `policy` in place; returns the average of its weights."""
    parts = [_tensors(samples) for samples in trained]
    everything = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = _order(Mixture([len(samples) for samples in trained], settings.weights, settings.seed), settings.batch)
    noise = torch.Generator().manual_seed(settings.seed)
    trainable = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    average = MovingAverage(policy, settings.ema)
    with tqdm(range(settings.steps), unit="step", mininterval=1, disable=not progress) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings.steps, settings.lr, settings.warmup)
            chosen = torch.from_numpy(next(order))
            batch = {name: values[chosen] for name, values in everything.items()}
            if settings.proprio_noise:
                shape = batch["proprio"].shape
                batch["proprio"] = batch["proprio"] + settings.proprio_noise * torch.randn(shape, generator=noise)
            loss = policy.loss(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            average.update()
            if step % 100 == 0:
                bar.set_postfix(l1=f"{loss.item():.4f}", refresh=False)
    return average


def _tensors(samples: Samples) -> dict[str, Tensor]:
    """All samples at once, as `BlindPolicy.loss` takes them."""
    every = np.arange(len(samples))
    return {
        "proprio": torch.from_numpy(samples.proprio(every)),
        "task_id": torch.from_numpy(samples.task_id),
        "actions": torch.from_numpy(samples.actions(every)),
    }


def _order(mixture: Mixture, batch: int) -> Iterator[NDArray[np.int64]]:
    """Endless batches (B,) of samples, epochs joined end to end."""
    waiting, epoch = np.empty(0, np.int64), 0
    while True:
        while len(waiting) < batch:
            waiting, epoch = np.concatenate([waiting, mixture.order(epoch)]), epoch + 1
        yield waiting[:batch]
        waiting = waiting[batch:]


@torch.no_grad()
def _measure(policy: BlindPolicy, parts: dict[str, Samples]) -> dict[str, ErrorTable]:
    """Mean absolute errors of each dataset's samples."""
    found = {}
    for name, samples in parts.items():
        errors = ActionErrors()
        every = _tensors(samples)
        for chosen in torch.arange(len(samples)).split(_EVALUATED_AT_ONCE):
            batch = {key: values[chosen] for key, values in every.items()}
            errors.add(policy(batch["proprio"], batch["task_id"]), batch["actions"])
        found[name] = errors.result(samples.statistics)
    return found


def _mean_l1(tables: dict[str, ErrorTable]) -> float | None:
    """Over all samples; None where there are none."""
    samples = sum(table.samples for table in tables.values())
    return sum(table.l1 * table.samples for table in tables.values()) / samples if samples else None


def _to_dict(table: ErrorTable) -> dict[str, Any]:
    return {"samples": table.samples, **table.to_dict()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, 2 for a mistake in the input."""
    d = BlindSettings(("",))
    p = argparse.ArgumentParser(prog="python -m vat_fast.train.blind", description=(__doc__ or "").splitlines()[0])
    p.add_argument("paths", nargs="+", metavar="PACKED", help="folders of `vat-fast data pack`")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the policy's folder")
    for name, what in (
        ("steps", "of training"),
        ("batch", "samples per step"),
        ("lr", "peak learning rate"),
        ("weight_decay", "of AdamW"),
        ("warmup", "fraction of the steps"),
        ("ema", "decay of the moving average of the weights"),
        ("hidden", "width of the two hidden layers"),
        ("chunk", "actions per prediction"),
        ("proprio_noise", "standard deviation, in normalised units"),
        ("holdout", "fraction of the episodes kept for measuring"),
        ("seed", "of weights, order, noise and split"),
    ):
        value = getattr(d, name)
        p.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"{what} (default {value})")
    p.add_argument("--weights", type=float, nargs="+", metavar="W", help="share of each folder (default: by its size)")
    p.add_argument("--no-task", dest="task", action="store_false", help="do not tell the policy its task either")
    p.add_argument("--replan-every", type=int, metavar="K", help="execute only K actions of each chunk")
    p.add_argument("--temporal-ensembling", type=float, metavar="M", help="average chunks with weights exp(-M i)")
    options = vars(p.parse_args(arguments))
    out = options.pop("out")
    for name in ("paths", "weights"):
        options[name] = None if options[name] is None else tuple(options[name])
    try:
        summary = train_blind(BlindSettings(**options), out)
    except (ValueError, OSError) as error:
        print(f"blind: {error}", file=sys.stderr)
        return 2
    held = summary["held_out_l1"]
    held_text = "no episode held out" if held is None else f"held out {held:.4f}"
    print(f"{out}: L1 of normalised actions: trained on {summary['train_l1']:.4f}, {held_text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
