"""Policy: a raw observation and a task in, robot actions out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vat_fast.actions import (
    GripperConvention,
    Statistics,
    check_gripper,
    choose_statistics,
    gripper_command,
    load_statistics,
    save_statistics,
)
from vat_fast.chunks import ChunkExecutor
from vat_fast.config import ConfigError, VATConfig
from vat_fast.files import write_text
from vat_fast.hub import local_folder
from vat_fast.model import VAT
from vat_fast.observation import LIBERO_CAMERAS, ImageProcessing, ObservationProcessor, check_cameras, check_fields
from vat_fast.tasks import RELEASED_TABLES, TaskError, TaskTable, as_task_id

POLICY_FILE = "policy.json"
STATISTICS_FILE = "dataset_statistics.json"
_COMBINED = "libero_spatial_object_goal"
_COMBINED_SUITES = ("libero_spatial", "libero_object", "libero_goal")


class Predictor(Protocol):
    """What a policy runs: VAT, or anything with its call signature and configuration."""

    @property
    def config(self) -> VATConfig:
        """The architecture."""

    def __call__(self, pixels: Tensor, task_id: Tensor, proprio: Tensor | None = None, /, **options: Any) -> Tensor:
        """(B, V, 3, S, S), (B,), (B, proprio_dim) or None -> normalised actions (B, C, A).

        A diffusion policy also takes `generator=`, a torch.Generator.
        """


@dataclass(frozen=True)
class PolicyConfig:
    """Everything beside the weights and the dataset statistics that turns a VAT into a policy; `policy.json`.

    image: the image pipeline.
    cameras: keys of the camera images, in the order of the model's views.
    tasks: task names and ids; None where tasks are given by id only.
    statistics_key: dataset whose statistics un-normalise the actions; None where the file has only one.
    gripper: convention of the last action dimension, "libero" or "none"; see `gripper_command`.
    replan_every: `Policy.step` predicts a new chunk every so many steps. None: when the chunk is used up, or
        every step with temporal ensembling.
    temporal_ensembling: m of the weights exp(-m * i), see `ChunkExecutor`; None for no ensembling.
    simulated_size, simulated_render: side of the simulator's images in pixels and their rendering, "official" or
        "fast", that the policy was trained on and `vat-fast eval` renders unless told otherwise. None: LIBERO's.

    Raises:
        ConfigError: an impossible value.
    """

    image: ImageProcessing = dataclasses.field(default_factory=ImageProcessing)
    cameras: tuple[str, ...] = LIBERO_CAMERAS
    tasks: TaskTable | None = None
    statistics_key: str | None = None
    gripper: GripperConvention = "libero"
    replan_every: int | None = None
    temporal_ensembling: float | None = None
    simulated_size: int | None = None
    simulated_render: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cameras", check_cameras(self.cameras))
        if not isinstance(self.image, ImageProcessing):
            raise ConfigError(f"image must be an ImageProcessing, got {self.image!r}")
        if not isinstance(self.tasks, TaskTable | None):
            raise ConfigError(f"tasks must be a TaskTable or None, got {self.tasks!r}")
        if not isinstance(self.statistics_key, str | None):
            raise ConfigError(f"statistics_key must be a dataset's name or None, got {self.statistics_key!r}")
        try:
            check_gripper(self.gripper)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        size, render = self.simulated_size, self.simulated_render
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 16):
            raise ConfigError(f"simulated_size must be an integer of at least 16, or None, got {size!r}")
        if render not in (None, "official", "fast"):
            raise ConfigError(f"simulated_render must be official or fast, or None, got {render!r}")
        every, m = self.replan_every, self.temporal_ensembling
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ConfigError(f"replan_every must be an integer of at least 1, or None, got {every!r}")
        if m is not None and (not isinstance(m, (int, float)) or isinstance(m, bool) or not 0 <= m < float("inf")):
            raise ConfigError(f"temporal_ensembling must be a number of at least 0, or None, got {m!r}")

    @classmethod
    def released(cls, suite: str, **overrides: Any) -> PolicyConfig:
        """The settings of the authors' checkpoint for a LIBERO suite, `libero_spatial` for example.

        The combined checkpoint, `libero_spatial_object_goal`, acts with the statistics of the suite at hand: give
        `statistics_key` too.

        Raises:
            ConfigError: unknown suite or impossible value.
        """
        try:
            tasks = TaskTable.released(suite)
        except TaskError as error:
            raise ConfigError(str(error)) from error
        key = None if suite == _COMBINED else f"{suite}_no_noops"
        return cls(**{"tasks": tasks, "statistics_key": key, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """The fields as values JSON knows."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tasks = None if self.tasks is None else self.tasks.to_dict()
        return {**values, "image": self.image.to_dict(), "cameras": list(self.cameras), "tasks": tasks}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PolicyConfig:
        """The configuration that `to_dict` gave; missing fields take their default.

        Raises:
            ConfigError: unknown field or impossible value.
        """
        check_fields(cls, values)
        fields = dict(values)
        if "image" in fields:
            fields["image"] = ImageProcessing.from_dict(fields["image"])
        if fields.get("tasks") is not None:
            try:
                fields["tasks"] = TaskTable.from_dict(fields["tasks"])
            except TaskError as error:
                raise ConfigError(f"tasks: {error}") from error
        return cls(**fields)

    def save(self, path: str | Path) -> None:
        """Write the configuration to `path` as JSON, replacing the file atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PolicyConfig:
        """The configuration in the JSON file `path`.

        Raises:
            ConfigError: not JSON, unknown field or impossible value.
            FileNotFoundError: no such file.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


class Policy:
    """A VAT with what surrounds it: images and state in, actions in robot units out.

        policy = Policy.from_pretrained("checkpoints/libero_goal", device="cuda", dtype=torch.bfloat16)
        actions = policy.act(observation, "turn on the stove")     # (C, A), without memory
        policy.reset()
        action = policy.step(observation, "turn on the stove")     # (A,), one per control step

    Args:
        vat: a VAT, a FrozenVAT, or anything with their call signature and `.config`.
        config: cameras, image pipeline, tasks, gripper, execution.
        statistics: of the dataset the model was trained on.
        device, dtype: of the tensors `vat` takes. None: those of its parameters, or CPU and float32 where it has
            none.
        seed: of the noise a diffusion policy starts from; `reset` starts the sequence again.

    Raises:
        ConfigError: configuration, statistics and model do not fit together; the message says where.
    """

    def __init__(
        self,
        vat: Predictor,
        config: PolicyConfig,
        statistics: Statistics,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        _check_fit(vat.config, config, statistics)
        self.vat = vat
        self.config = config
        self.statistics = statistics
        example = next(vat.parameters(), None) if isinstance(vat, torch.nn.Module) else vat
        default: torch.device = getattr(example, "device", torch.device("cpu"))
        self.device = torch.device(device) if device is not None else default
        self.dtype = dtype or getattr(example, "dtype", torch.float32)
        proprio = statistics.proprio if vat.config.proprio_dim else None
        self._processor = ObservationProcessor(config.image, config.cameras, proprio, raw=_takes_bytes(vat, config))
        self._executor = self.new_executor()
        self._last_task: int | None = None
        self._seed = seed
        self._generator = torch.Generator(self.device)
        self.reset()

    @property
    def chunk_size(self) -> int:
        """C, actions per prediction."""
        return self.vat.config.chunk_size

    def reset(self, seed: int | None = None) -> None:
        """Start an episode: forget predicted chunks; start the noise again, from `seed` where one is given."""
        self._executor.reset()
        self._last_task = None
        self._seed = self._seed if seed is None else seed
        self._generator.manual_seed(self._seed)

    def act(
        self, observation: Mapping[str, Any], task: str | int, generator: torch.Generator | None = None
    ) -> NDArray[np.float32]:
        """The chunk of actions (C, A) for one observation, float32, in robot units.

        Args:
            observation: camera name -> (H, W, 3) uint8, and robot state where the model reads it; see
                `ObservationProcessor`.
            task: name or id.
            generator: noise source of a diffusion policy, on the policy's device; None: the policy's own.

        Raises:
            ObservationError: the observation does not fit.
            TaskError: unknown task.
        """
        return self.act_batch([observation], [task], generator)[0]

    def act_batch(
        self,
        observations: Sequence[Mapping[str, Any]],
        tasks: str | int | Sequence[str | int],
        generator: torch.Generator | None = None,
    ) -> NDArray[np.float32]:
        """Chunks (B, C, A) for B observations in one forward pass; one task for all, or one each.

        Raises:
            ObservationError, TaskError: as `act`.
            ValueError: no observations, or another number of tasks.
        """
        return self.to_robot(self.predict(observations, tasks, generator))

    def step(self, observation: Mapping[str, Any], task: str | int) -> NDArray[np.float32]:
        """The action (A,) for this control step, float32, in robot units.

        Chunks are executed as `PolicyConfig` says, by default open loop: only every C-th observation is looked
        at. Ensembling averages before the gripper is rounded to open or closed. Another task than the step
        before drops what was planned for that one.

        Raises:
            ObservationError, TaskError: as `act`.
        """
        task_id = self.task_id(task)
        if task_id != self._last_task:
            self._executor.reset()
            self._last_task = task_id
        if self._executor.needs_chunk:
            self._executor.push(self.predict([observation], task_id)[0])
        return self.to_robot(self._executor.pop())

    # The parts, for code that steps many robots at once.

    def new_executor(self) -> ChunkExecutor:
        """An executor with this policy's settings; it takes chunks of `predict` and gives `to_robot` its actions."""
        every = self.config.replan_every
        if every is None:
            every = self.chunk_size if self.config.temporal_ensembling is None else 1
        return ChunkExecutor(self.chunk_size, every, self.config.temporal_ensembling)

    def predict(
        self,
        observations: Sequence[Mapping[str, Any]],
        tasks: str | int | Sequence[str | int],
        generator: torch.Generator | None = None,
    ) -> NDArray[np.float32]:
        """As `act_batch`, but the model's own normalised actions (B, C, A)."""
        single = isinstance(tasks, str) or np.ndim(tasks) == 0
        each: Sequence[Any] = [tasks] * len(observations) if single else cast(Sequence[Any], tasks)
        if not observations or len(each) != len(observations):
            raise ValueError(f"need one task per observation, got {len(observations)} and {len(each)}")
        ids = torch.tensor([self.task_id(task) for task in each], device=self.device)
        inputs = [self._processor(observation) for observation in observations]
        pixels = self._tensor(np.stack([entry.pixels for entry in inputs]))
        states = [entry.proprio for entry in inputs if entry.proprio is not None]
        proprio = self._tensor(np.stack(states)) if states else None
        options = {"generator": generator or self._generator} if self.vat.config.head == "diffusion" else {}
        with torch.inference_mode():
            return self.vat(pixels, ids, proprio, **options).float().cpu().numpy()

    def to_robot(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised model actions (..., A) -> robot units: un-normalised, gripper in the robot's convention."""
        return gripper_command(self.statistics.action.unnormalize(actions), self.config.gripper)

    def task_id(self, task: str | int) -> int:
        """The id of a task given by name or id.

        Raises:
            TaskError: unknown, or a name and the policy has no task table.
        """
        if self.config.tasks is not None:
            return self.config.tasks.id(task)
        if isinstance(task, str):
            raise TaskError(f"this policy has no task table, so {task!r} has no id; give an id or set config.tasks")
        task_id, count = as_task_id(task), self.vat.config.num_tasks
        if not 0 <= task_id < count:
            raise TaskError(f"unknown task id {task_id}; ids are 0 to {count - 1}")
        return task_id

    # Files.

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model (config.json, model.safetensors), policy.json and dataset_statistics.json.

        Raises:
            TypeError: the model has no `save_pretrained` (a frozen engine; save the policy it came from).
        """
        save_model = getattr(self.vat, "save_pretrained", None)
        if save_model is None:
            raise TypeError(
                f"{type(self.vat).__name__} cannot be saved; save the policy of the VAT it came from "
                "(Policy.from_pretrained(..., frozen=False))"
            )
        save_model(folder)
        # policy.json last: where it is, the rest is.
        save_statistics(Path(folder) / STATISTICS_FILE, [self.statistics])
        self.config.save(Path(folder) / POLICY_FILE)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str | None = None,
        config: PolicyConfig | None = None,
        suite: str | None = None,
        seed: int = 0,
        frozen: bool = True,
        **options: Any,
    ) -> Policy:
        """The policy in a folder that `save_pretrained` wrote, or one of the authors' released folders.

        Args:
            name_or_folder: folder, or Hub repository.
            device, dtype: where and in what precision the model runs, a torch dtype or "fp32", "bf16", "fp16", frozen
                also "int16" (x86 CPUs), "int8" and "fp8"; dtype None: as stored.
            config: instead of the folder's policy.json.
            suite: LIBERO suite of a released folder, which has no policy.json: `PolicyConfig.released` applies.
                Needed where the folder's statistics are not those of one suite. With the statistics of the
                combined checkpoint it chooses the suite whose statistics to act with.
            seed: see `Policy`.
            frozen: freeze the model (`VAT.freeze`), the fastest way to act. False keeps the VAT itself, which can be
                trained, saved and looked into.
            options: for `VAT.freeze`, such as batch=[1, 8] or executor="torch".

        Raises:
            ConfigError: no policy.json and nothing to tell the settings by, or parts that do not fit together.
            StatisticsError: dataset statistics are missing or malformed, or it is open which to use.
            FileNotFoundError: there is no such folder or repository.
            TypeError, ValueError: options that `VAT.freeze` does not know, or cannot fulfil.
        """
        folder = local_folder(name_or_folder, [POLICY_FILE, STATISTICS_FILE])
        released = config is None and not (folder / POLICY_FILE).is_file()
        if suite is not None and not released:
            raise ConfigError(f"suite={suite!r} is for released folders; {name_or_folder} has its own configuration")
        # Everything small first: a mistake shows before the weights are read.
        datasets = load_statistics(folder / STATISTICS_FILE)
        if released:
            config = _released_config(folder, datasets, suite)
        elif config is None:
            config = PolicyConfig.load(folder / POLICY_FILE)
        statistics = choose_statistics(datasets, config.statistics_key, source=str(folder / STATISTICS_FILE))
        if options and not frozen:
            raise TypeError(f"{', '.join(options)} is for a frozen policy; leave frozen=True, or leave it out")
        vat = VAT.from_pretrained(name_or_folder, dtype=None if frozen else _torch_dtype(dtype))
        if released:
            image = dataclasses.replace(config.image, image_size=vat.config.image_size)
            config = dataclasses.replace(config, image=image)
        if not frozen:
            return cls(cast(Predictor, vat.to(device).eval()), config, statistics, seed=seed)
        precision = _precision(next(vat.parameters()).dtype if dtype is None else dtype)
        if torch.device(device).type == "cuda":
            # Raw bytes: a quarter of the transfer, and patch embedding becomes one launch.
            options = {"images": "uint8", "mean": config.image.mean, "std": config.image.std, **options}
        fast = vat.freeze(dtype=precision, device=device, **options)
        return cls(cast(Predictor, fast), config, statistics, seed=seed)

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array).to(self.device)
        return tensor if tensor.dtype == torch.uint8 else tensor.to(self.dtype)


_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _precision(dtype: torch.dtype | str) -> Any:
    """The name of a precision, for `VAT.freeze`."""
    return dtype if isinstance(dtype, str) else _PRECISIONS[dtype]


def _torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    for known, name in _PRECISIONS.items():
        if name == dtype:
            return known
    raise ValueError(f"dtype {dtype!r} needs a frozen policy; unfrozen ones run in {', '.join(_PRECISIONS.values())}")


def _takes_bytes(vat: Predictor, config: PolicyConfig) -> bool:
    """Whether a frozen model normalises images itself; then with the policy's own mean and std."""
    target = getattr(vat, "target", None)
    if target is None or target.images == "float":
        return False
    if (tuple(target.mean), tuple(target.std)) != (tuple(config.image.mean), tuple(config.image.std)):
        raise ConfigError(
            f"the model was frozen for images of mean {target.mean} and std {target.std}, the policy's are "
            f"{config.image.mean} and {config.image.std}: freeze with the policy's"
        )
    return True


def _released_config(folder: Path, datasets: Mapping[str, Statistics], suite: str | None) -> PolicyConfig:
    """The settings of a released folder, told by the suite or by the datasets of its statistics."""
    if suite is None:
        known = [name for name in RELEASED_TABLES if set(datasets) == {f"{name}_no_noops"}]
        if not known:
            raise ConfigError(
                f"{folder} has no {POLICY_FILE}, and its statistics ({', '.join(datasets)}) are not those of one "
                "LIBERO suite; name the suite, or pass config=PolicyConfig(...) with cameras, images and tasks"
            )
        suite = known[0]
    combined = set(datasets) == {f"{name}_no_noops" for name in _COMBINED_SUITES}
    table = _COMBINED if combined and suite in _COMBINED_SUITES else suite
    return PolicyConfig.released(table, statistics_key=f"{suite}_no_noops")


def _check_fit(model: VATConfig, config: PolicyConfig, statistics: Statistics) -> None:
    """Raise one ConfigError for the first thing in which model, configuration and statistics disagree."""
    action, proprio = statistics.action, statistics.proprio
    if config.image.image_size != model.image_size:
        raise ConfigError(f"images are made {config.image.image_size} pixels wide, the model takes {model.image_size}")
    if len(config.cameras) != model.num_views:
        raise ConfigError(f"the model sees {model.num_views} views, but cameras are {', '.join(config.cameras)}")
    if action.dim != model.action_dim:
        raise ConfigError(f"the model's actions have {model.action_dim} numbers, the statistics {action.dim}")
    if model.proprio_dim and proprio is None:
        raise ConfigError(f"the model reads proprioception, but statistics {statistics.key!r} have no proprio entry")
    if model.proprio_dim and proprio is not None and proprio.dim != model.proprio_dim:
        raise ConfigError(f"the model reads {model.proprio_dim} numbers of proprio, the statistics have {proprio.dim}")
    if config.statistics_key not in (None, statistics.key):
        raise ConfigError(f"the configuration wants statistics {config.statistics_key!r}, got {statistics.key!r}")
    if config.replan_every is not None and config.replan_every > model.chunk_size:
        raise ConfigError(f"replan_every {config.replan_every} is more than the chunk of {model.chunk_size} actions")
    if config.tasks is not None and model.task_conditioning != "none":
        for name, task_id in config.tasks.items():
            if task_id >= model.num_tasks:
                raise ConfigError(f"task {name!r} has id {task_id}, but the model knows {model.num_tasks} tasks")
