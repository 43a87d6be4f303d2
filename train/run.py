"""A whole run on one rank: set up, resume, train, validate, keep checkpoints, export."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from vat_fast import released
from vat_fast.actions import save_statistics
from vat_fast.config import ConfigError, VATConfig
from vat_fast.files import write_text
from vat_fast.policy import POLICY_FILE, STATISTICS_FILE, Policy
from vat_fast.train import launch
from vat_fast.train.adapters import LoRAOptions, add_lora
from vat_fast.train.build import build_model, describe_backend
from vat_fast.train.checkpoints import CheckpointError, Checkpoints
from vat_fast.train.config import Config
from vat_fast.train.datasets import open_data, prepare_paths
from vat_fast.train.ema import MovingAverage
from vat_fast.train.estimate import training_flops
from vat_fast.train.export import (
    CHECKPOINTS,
    CONFIG_FILE,
    MODEL_CONFIG_FILE,
    full_state,
    make_policy,
    released_folder,
    write_policy,
    write_released,
)
from vat_fast.train.log import RunLog, Speedometer, peak_flops
from vat_fast.train.loop import Trainer, total_steps
from vat_fast.train.metrics import ActionErrors
from vat_fast.train.parameter_groups import describe_groups, parameter_groups
from vat_fast.train.validate import RolloutOptions, check_rollout, rollout, validate


class Run:
    """Everything of a training run on one rank; `Run(...).train()` is the run.

    Args:
        config: not yet resolved.
        place: this rank's, from `launch.start`.
        resume: "auto", "never" or a checkpoint's folder.

    Raises:
        ConfigError: the configuration does not fit data, model or machine; or a fresh start in a used folder.
        DataError: demonstrations that cannot be read.
    """

    def __init__(self, config: Config, place: launch.Place, resume: str = "auto") -> None:
        asked = config.train.precision
        self.config = config = config.resolve(place.world_size, place.device.type)
        self.place, self.is_main = place, place.rank == 0
        self.notes: list[str] = []
        if asked == "auto":
            does = "multiplies" if config.train.precision == "autocast" else "does not multiply"
            self.notes.append(f"train.precision auto is {config.train.precision}: this device {does} bfloat16 itself")
        self.folder = Path(config.output)
        k, t = config.checkpoint, config.train
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, k.keep_last, k.keep_every)
        begin = self._choose_start(resume)
        self.rollout = None
        if config.validate.rollout is not None:
            self.rollout = RolloutOptions.from_dict(config.validate.rollout)
            check_rollout(self.rollout)
        torch.use_deterministic_algorithms(t.deterministic)

        paths = prepare_paths(config, self.is_main)
        vat = build_model(config)
        if k.released:
            _check_released(vat.config)
        self.data = open_data(config, vat.config, paths, place.rank, place.world_size)
        if t.lora is not None:
            add_lora(vat, LoRAOptions.from_dict(t.lora))
        # DeepSpeed puts this rank's share in the place of the groups' parameters, so they are described before.
        self.groups = describe_groups(parameter_groups(vat, t))
        total = total_steps(config, self.data.train.batches_per_epoch)
        self.trainer = Trainer(config, vat, total, place.device, place.rank)
        self.ema = None if t.ema is None else MovingAverage(vat, t.ema, place.rank, place.world_size)
        if begin is not None:
            self._load(begin)
        if self.is_main:
            self._write_settings()
        self.log = RunLog(
            self.folder,
            total,
            self.trainer.step,
            is_main=self.is_main,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=config.to_dict(),
        )
        self._describe(begin)

    def train(self) -> int:
        """Train to the end, or until somebody asks to stop; returns the exit status. The run is closed then."""
        try:
            return self._train()
        finally:
            self.close()

    def _train(self) -> int:
        trainer, config = self.trainer, self.config
        v, k = config.validate, config.checkpoint
        dtype = torch.float32 if config.train.precision == "fp32" else torch.bfloat16
        lora = None if config.train.lora is None else LoRAOptions.from_dict(config.train.lora)
        flops = training_flops(trainer.vat.config, lora)
        speed = Speedometer(flops, peak_flops(self.place.device, dtype), self.place.world_size, self.place.device)
        errors, losses = ActionErrors(), ActionErrors()
        saved = trainer.step
        while trainer.step < trainer.total:
            result = trainer.train_step(self.data.train)
            step = trainer.step
            if self.ema is not None:
                self.ema.update()
            speed.add(result.seconds, result.samples)
            losses.add(result.loss.reshape(1, 1, 1), torch.zeros_like(result.loss).reshape(1, 1, 1))
            for outcome in result.outcomes:
                errors.add(outcome.prediction, outcome.target)
            self.log.advance(step)
            is_last = step == trainer.total
            if step % config.log.every == 0 or is_last:
                figures = {"loss": losses.result().l1, "lr": result.lr, "grad_norm": result.grad_norm}
                table = errors.result().to_dict()
                self.log.write(step, "train", {**figures, **speed.read(), **table, "epoch": self.data.train.epoch})
                errors.reset()
                losses.reset()
            if v.every is not None and (step % v.every == 0 or is_last):
                self.validate()
            stop = launch.stop_requested()
            if stop or is_last or (k.every is not None and step % k.every == 0):
                self.save()
                saved = step
            if stop and not is_last:
                self.log.say(f"asked to stop: step {saved} is saved, the same command goes on from there")
                return launch.STOPPED
        if k.export or k.released:
            self.export()
        return 0

    def validate(self) -> None:
        """Measure the held-out episodes, with the averaged weights where there are any, and log what was found."""
        trainer, config = self.trainer, self.config
        trainer.engine.eval()
        with contextlib.nullcontext() if self.ema is None else self.ema.applied():
            for name, loader in self.data.validation.items():
                found = validate(
                    trainer.engine,
                    loader,
                    self.data.statistics[name],
                    samples_actions=trainer.vat.config.head == "diffusion",
                    device=self.place.device,
                    seed=config.seed,
                )
                kind = "validation" if len(self.data.validation) == 1 else f"validation {name}"
                self.log.write(trainer.step, kind, found.to_dict())
        trainer.engine.train()
        if self.rollout is not None:
            policy = self.policy()
            if self.is_main:
                # The other ranks wait in the next step's communication, which has the process group's time limit.
                self.log.write(trainer.step, "rollout", rollout(policy, self.rollout))

    def save(self) -> None:
        """Write a checkpoint; what a failure means is the configuration's choice.

        Raises:
            CheckpointError: it could not be written, and the run stops for that.
        """
        step = self.trainer.step
        state = {"loader": self.data.train.state_dict(), "total": self.trainer.total}
        tensors = {} if self.ema is None else self.ema.state_dict()
        try:
            self.checkpoints.save(self.trainer.engine, step, state, tensors)
        except CheckpointError as error:
            if self.config.checkpoint.on_failure == "stop":
                raise
            self.log.say(f"no checkpoint of step {step}, training goes on: {error}")

    def policy(self) -> Policy:
        """The policy of this moment, from the averaged weights where there are any; call it on all ranks together."""
        vat, lora = self.trainer.vat, self.config.train.lora
        with contextlib.nullcontext() if self.ema is None else self.ema.applied():
            weights = full_state(vat, masters=self.ema is None)
        statistics = self.data.distinct_statistics()
        return make_policy(
            weights, vat.config, self.data.policy, statistics, None if lora is None else LoRAOptions.from_dict(lora)
        )

    def export(self) -> None:
        """Write the policy into the run's folder: our own layout, the authors', or both, as configured."""
        policy, k = self.policy(), self.config.checkpoint
        if not self.is_main:
            return
        statistics = self.data.distinct_statistics()
        if k.export:
            folder = self.folder / "policy"
            write_policy(policy, statistics, folder)
            self.log.say(f"the policy is in {folder}")
        if k.released:
            folder = released_folder(self.folder, self.trainer.step)
            for note in write_released(policy, statistics, folder, self.trainer.step):
                self.log.say(f"note: {note}")
            self.log.say(f"the policy in the authors' layout is in {folder}")

    def close(self) -> None:
        """Stop the loaders' workers, finish the log, and take DeepSpeed's hooks off the model."""
        for loader in (self.data.train, *self.data.validation.values()):
            loader.close()
        self.log.close()
        # Here, where the process group is still there, and not whenever the interpreter ends.
        self.trainer.engine.destroy()

    def _choose_start(self, resume: str) -> Path | None:
        """The checkpoint to go on from, or None for a fresh start."""
        newest = self.checkpoints.newest()
        if resume == "auto":
            return newest
        if resume != "never":
            return Path(resume)
        if newest is not None:
            raise ConfigError(
                f"{newest} is there already: a fresh start would overwrite that run; choose another output or remove "
                f"{self.folder}"
            )
        return None

    def _load(self, path: Path) -> None:
        state, tensors = self.checkpoints.load(self.trainer.engine, path)
        self.trainer.step = state["step"]
        self.data.train.load_state_dict(state["loader"])
        if self.ema is not None:
            self.ema.load_state_dict(tensors)
        if state["total"] != self.trainer.total:
            self.notes.append(
                f"the run had {state['total']} steps when it was saved, now {self.trainer.total}: the learning rate "
                "follows the new schedule"
            )

    def _write_settings(self) -> None:
        """What the run is, beside its logs: enough to export any checkpoint without the data."""
        write_text(self.folder / CONFIG_FILE, self.config.to_yaml())
        write_text(self.folder / MODEL_CONFIG_FILE, self.trainer.vat.config.to_json())
        self.data.policy.save(self.folder / POLICY_FILE)
        save_statistics(self.folder / STATISTICS_FILE, self.data.distinct_statistics())

    def _describe(self, begin: Path | None) -> None:
        """Say what is going to happen."""
        config, trainer, say = self.config, self.trainer, self.log.say
        z, t, world = config.zero, config.train, self.place.world_size
        samples = sum(len(part) for part in self.data.train.samples)
        held = sum(len(part) for loader in self.data.validation.values() for part in loader.samples)
        say(f"{len(self.data.statistics)} datasets: {samples} samples to train on, {held} held out to measure")
        say(f"{config.model.preset}: {describe_backend(trainer.vat, self.place.device)}")
        say(self.groups)
        threads = f" with {torch.get_num_threads()} threads" if self.place.device.type == "cpu" else ""
        say(
            f"{world} ranks{threads}, ZeRO-{z.stage}, {t.precision}: {config.micro_batch} samples x "
            f"{config.accumulation} forwards x {world} ranks = {t.global_batch} a step, {trainer.total} steps"
        )
        for note in self.notes:
            say(note)
        if begin is not None:
            say(f"goes on after step {trainer.step} from {begin}")


def _check_released(config: VATConfig) -> None:
    """Raise one ConfigError, before anything is trained, where the authors' layout could not be written."""
    try:
        released.check_exportable(config)
    except ValueError as error:
        raise ConfigError(f"checkpoint.released: {error}; set it to false") from error


def run(config: Config, place: launch.Place, resume: str = "auto") -> int:
    """A whole run on this rank; returns the exit status, 0 or `launch.STOPPED`. Errors as `Run`."""
    return Run(config, place, resume).train()
