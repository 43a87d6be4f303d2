"""The training loop: batches in, optimiser steps, numbers, validation and checkpoints out."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from vat_fast.model import VAT
from vat_fast.train.build import build_engine, set_learning_rate
from vat_fast.train.config import Config
from vat_fast.train.data.loader import DemonstrationLoader
from vat_fast.train.parameter_groups import parameter_groups
from vat_fast.train.schedule import learning_rate
from vat_fast.train.step import Outcome


@dataclass
class StepResult:
    """One optimiser step on this rank.

    loss: mean over the step's forwards, detached.
    outcomes: of each forward, for the metrics.
    lr: the learning rate.
    grad_norm: of the whole gradient before clipping.
    samples: of this rank.
    seconds: time in `data`, `forward`, `backward` and `optimizer`.
    """

    loss: Tensor
    outcomes: list[Outcome]
    lr: float
    grad_norm: float
    samples: int
    seconds: dict[str, float]


class Trainer:
    """A model in its engine, and how it takes one optimiser step; `run.py` surrounds it with a whole run.

    Args:
        config: resolved.
        vat: what trains; it becomes part of the engine.
        total: optimiser steps of the run, for the schedule.
        device: of this rank.
        rank: of this process; keys its noise.
    """

    def __init__(self, config: Config, vat: VAT, total: int, device: torch.device, rank: int) -> None:
        self.config, self.vat, self.total = config, vat, total
        self.device, self.rank = device, rank
        self.step = 0
        """Optimiser steps done."""
        self.groups = parameter_groups(vat, config.train)
        self.engine = build_engine(config, vat, self.groups)
        self._generator = torch.Generator(device)

    def train_step(self, loader: DemonstrationLoader) -> StepResult:
        """One optimiser step on the next batches of `loader`."""
        config, engine, t = self.config, self.engine, self.config.train
        lr = learning_rate(self.step, self.total, t.lr, t.warmup, t.final_lr)
        set_learning_rate(engine.optimizer, lr)
        clock = Clock(self.device)
        outcomes, samples = [], 0
        for micro in range(config.accumulation):
            batch = loader.prepare(next(loader), self.device)
            clock.lap("data")
            outcome: Outcome = engine(batch, self.noise(micro))
            clock.lap("forward")
            engine.backward(outcome.loss)
            clock.lap("backward")
            is_last = micro == config.accumulation - 1
            norm = self._whole_gradient() if config.zero.stage == 0 and is_last else None
            engine.step()
            clock.lap("optimizer")
            outcomes.append(Outcome(outcome.loss.detach(), outcome.prediction, outcome.target))
            samples += len(batch["actions"])
        self.step += 1
        norm = engine.get_global_grad_norm() if norm is None else norm
        loss = torch.stack([outcome.loss for outcome in outcomes]).mean()
        return StepResult(loss, outcomes, lr, float(norm), samples, clock.seconds)

    def _whole_gradient(self) -> Tensor:
        """Its norm at stage 0, where every rank has all gradients and DeepSpeed does not tell."""
        return get_total_norm([p.grad for p in self.vat.parameters() if p.grad is not None])

    def noise(self, micro: int) -> torch.Generator | None:
        """The noise source of one forward, where something is random: keyed by its place, it needs no saving."""
        t = self.config.train
        if self.vat.config.head != "diffusion" and not (t.proprio_dropout or t.proprio_noise):
            return None
        place = (self.step * self.config.accumulation + micro) * 65_537 + self.rank
        return self._generator.manual_seed(self.config.seed * 1_000_003 + place)


class Clock:
    """Seconds spent in named parts of a step. On an accelerator it waits for the device at every lap."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._on_gpu = device.type == "cuda"
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What passed since the last lap belongs to `name`."""
        if self._on_gpu:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def total_steps(config: Config, batches_per_epoch: int) -> int:
    """Optimiser steps of a resolved run whose loader has so many batches per epoch."""
    t = config.train
    if t.steps is not None:
        return t.steps
    assert t.epochs is not None
    return max(1, round(t.epochs * batches_per_epoch / config.accumulation))
