"""From the configuration's paths to loaders, and to what the exported policy must know of the data."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vat_fast.actions import Statistics
from vat_fast.config import ConfigError, VATConfig
from vat_fast.observation import LIBERO_CAMERAS
from vat_fast.policy import PolicyConfig
from vat_fast.train.config import Config
from vat_fast.train.data.augment import Augmentation
from vat_fast.train.data.episode import KeyMap
from vat_fast.train.data.loader import DemonstrationLoader
from vat_fast.train.data.mixture import merge_tasks
from vat_fast.train.data.pack import PackOptions, pack
from vat_fast.train.data.packed import PackedDataset, is_packed
from vat_fast.train.data.targets import Samples, held_out
from vat_fast.train.synthetic import SyntheticOptions, write_demonstrations


@dataclass
class RunData:
    """What a run trains on.

    train: endless batches of this rank.
    validation: dataset name -> its held-out episodes, each sample once, with the images a policy sees.
    policy: of the exported policy.
    statistics: dataset name -> what normalises it; the first are what the exported policy acts with.
    """

    train: DemonstrationLoader
    validation: dict[str, DemonstrationLoader]
    policy: PolicyConfig
    statistics: dict[str, Statistics]

    def distinct_statistics(self) -> list[Statistics]:
        """Each once, also where several datasets share them."""
        return list({statistics.key: statistics for statistics in self.statistics.values()}.values())


def prepare_paths(config: Config, is_first: bool, poll_seconds: float = 1.0) -> list[Path]:
    """The packed folders of the run; sources of other formats are packed first.

    One process does the work (`is_first`), the others wait for its result without a collective call, whose time
    limit packing may well exceed.

    Raises:
        DataError: a source that cannot be read or packed.
        ConfigError: impossible options of packing or of synthetic data.
    """
    d = config.data
    if d.synthetic is not None and is_first and not Path(d.paths[0]).exists():
        write_demonstrations(Path(d.paths[0]), _options(SyntheticOptions, d.synthetic, "data.synthetic"))
    folder = Path(config.output) / "data" if d.packed is None else Path(d.packed)
    keys = _options(KeyMap, d.pack.get("keys", {}), "data.pack.keys")
    options = _options(PackOptions, {**d.pack, "keys": keys}, "data.pack")
    packed = []
    for path in map(Path, d.paths):
        target = folder / path.stem
        if is_first and not is_packed(path) and not is_packed(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            pack([path], target, options)
        while not is_packed(path) and not is_packed(target):
            time.sleep(poll_seconds)
        packed.append(path if is_packed(path) else target)
    return packed


def open_data(config: Config, model: VATConfig, paths: Sequence[Path], rank: int, world_size: int) -> RunData:
    """Loaders over packed folders, for one rank of a resolved configuration.

    Raises:
        DataError: a damaged folder, or datasets that do not fit together.
        ConfigError: datasets that do not fit the model.
    """
    d = config.data
    datasets = [PackedDataset(path) for path in paths]
    cameras = d.cameras or list(datasets[0].cameras)[: model.num_views]
    _check_fit(model, datasets, cameras)
    training: list[Samples] = []
    validation: dict[str, Samples] = {}
    for data in datasets:
        out = held_out([entry.name for entry in data.episodes], d.holdout, config.seed)
        statistics = data.statistics if d.statistics == "own" else datasets[0].statistics
        training.append(Samples(data, model.chunk_size, cameras, ~out, statistics))
        if out.any() and config.validate.every is not None:
            held = Samples(data, model.chunk_size, cameras, out, statistics)
            validation[data.name] = thinned(held, config.validate.samples)
    common: dict[str, Any] = {
        "image_size": model.image_size,
        "seed": config.seed,
        "rank": rank,
        "world_size": world_size,
        "workers": d.workers,
        "prefetch": d.prefetch,
        "mean": d.mean,
        "std": d.std,
        "crop_area": d.crop_area,
    }
    train = DemonstrationLoader(
        training,
        config.micro_batch,
        augmentation=Augmentation() if d.augment else None,
        augment_on=d.augment_on,
        weights=d.weights,
        **common,
    )
    size = config.validate.batch or config.micro_batch
    # Workers of its own only while it runs; one is enough to keep up without augmentation.
    common["workers"] = min(d.workers, 1)
    loaders = {
        name: DemonstrationLoader([samples], size, shuffle=False, drop_last=False, **common)
        for name, samples in validation.items()
    }
    policy = policy_config(config, model, datasets, cameras)
    return RunData(train, loaders, policy, {part.dataset.name: part.statistics for part in training})


def thinned(samples: Samples, most: int | None) -> Samples:
    """At most so many of the samples, evenly spread over the episodes; changes `samples`."""
    if most is not None and len(samples) > most:
        chosen = np.linspace(0, len(samples) - 1, most).round().astype(np.int64)
        samples.steps, samples.task_id = samples.steps[chosen], samples.task_id[chosen]
    return samples


def policy_config(
    config: Config, model: VATConfig, datasets: Sequence[PackedDataset], cameras: Sequence[str]
) -> PolicyConfig:
    """How a policy trained on these data sees and acts.

    LIBERO's data (gripper convention "libero") were packed upright, while its simulator renders upside down: the
    policy turns its images. Other data are taken as they come. `data.policy` has the last word.

    Raises:
        ConfigError: an unknown field in `data.policy`, or a value that cannot be.
    """
    d, gripper = config.data, datasets[0].gripper
    is_libero = gripper == "libero"
    image = {
        "image_size": model.image_size,
        "rotation": "rotate_180" if is_libero else "none",
        "crop_area": d.crop_area,
        **({} if d.mean is None else {"mean": tuple(d.mean)}),
        **({} if d.std is None else {"std": tuple(d.std)}),
    }
    values = {
        "cameras": list(LIBERO_CAMERAS[: model.num_views] if is_libero and model.num_views <= 2 else cameras),
        "tasks": merge_tasks([data.tasks for data in datasets]).to_dict(),
        "statistics_key": datasets[0].statistics.key,
        "gripper": gripper,
        **d.policy,
    }
    return PolicyConfig.from_dict({**values, "image": {**image, **d.policy.get("image", {})}})


def _check_fit(model: VATConfig, datasets: Sequence[PackedDataset], cameras: Sequence[str]) -> None:
    """Raise one ConfigError for the first thing in which model and data disagree."""
    if len(cameras) != model.num_views:
        raise ConfigError(
            f"the model sees {model.num_views} views, {datasets[0].path} gives {len(cameras)} ({', '.join(cameras)}): "
            "set model.options.num_views or data.cameras"
        )
    names = [data.name for data in datasets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two datasets are called {name!r}; pack one of them under another name (pack: name)")
    for data in datasets:
        width = data.actions.shape[1]
        if width != model.action_dim:
            raise ConfigError(
                f"{data.path} has actions of {width} numbers, the model {model.action_dim}: set "
                "model.options.action_dim"
            )
        state = 0 if data.state is None else data.state.shape[1]
        if model.proprio_dim and state != model.proprio_dim:
            raise ConfigError(
                f"the model reads {model.proprio_dim} numbers of proprioception, {data.path} has {state}: set "
                "model.options.proprio_dim"
            )
        if data.gripper != datasets[0].gripper:
            raise ConfigError(
                f"{data.path} has gripper convention {data.gripper!r}, {datasets[0].path} {datasets[0].gripper!r}: "
                "one policy has one; pack them alike"
            )
        worst = max(data.tasks.values())
        if model.task_conditioning != "none" and worst >= model.num_tasks:
            raise ConfigError(
                f"{data.path} has a task with id {worst}, the model knows {model.num_tasks} tasks: set "
                f"model.options.num_tasks to {worst + 1} or more"
            )


def _options(kind: Any, values: dict[str, Any], name: str) -> Any:
    """A dataclass from a mapping of the configuration, unknown keys named."""
    known = [entry.name for entry in dataclasses.fields(kind)]
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {name}.{key}; it has {', '.join(known)}")
    return kind(**values)
