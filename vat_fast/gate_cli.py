"""`vat-fast gate`: whether a checkpoint still acts like itself when it is frozen in a lossy precision."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from vat_fast.cli import Commands
    from vat_fast.frozen.gate import GateReport
    from vat_fast.policy import Policy

Samples = list[dict[str, "Tensor"]]


def add_command(commands: Commands) -> None:
    """Register the command."""
    from vat_fast.frozen.target import Executor, Precision

    p = commands.add_parser(
        "gate", help="compare a checkpoint frozen in some precision with itself in fp32; status 1 if it is refused"
    )
    p.add_argument("checkpoint", help="a folder (ours or a released one) or a Hub id")
    p.add_argument("--dtype", choices=get_args(Precision), default="int8")
    p.add_argument(
        "--observations",
        type=Path,
        metavar="PATH",
        help="a packed dataset, or LIBERO's HDF5 (file or folder); default: pictures like a robot's, with extremes, "
        "and once more with outlier channels planted",
    )
    p.add_argument("--samples", type=int, default=16, help="observations to compare on (default 16)")
    p.add_argument(
        "--calibration", type=int, default=32, help="other observations to calibrate integers on CPUs with (default 32)"
    )
    p.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    p.add_argument("--executor", choices=get_args(Executor), help="who runs the plan (default: the fastest)")
    p.add_argument("--suite", help="LIBERO suite of a released folder, where its statistics do not tell")
    p.add_argument("--seed", type=int, default=0, help="of the choice of observations")
    p.add_argument("--json", action="store_true", help="the reports as JSON")
    p.set_defaults(run=_gate)


def _gate(args: argparse.Namespace) -> int:
    import torch

    from vat_fast.frozen.gate_inputs import plant_outliers, realistic_samples
    from vat_fast.frozen.target import TAKES_SAMPLES
    from vat_fast.policy import Policy

    if min(args.samples, args.calibration) < 1:
        raise ValueError(f"--samples and --calibration must be at least 1, got {args.samples} and {args.calibration}")
    policy = Policy.from_pretrained(args.checkpoint, dtype=torch.float32, suite=args.suite, frozen=False)
    reports: dict[str, GateReport] = {}
    # Integers on CPUs are calibrated on other observations than those compared on.
    counts = [args.samples, args.calibration] if args.dtype in TAKES_SAMPLES else [args.samples]
    if args.observations is not None:
        sets = recorded_samples(args.observations, policy, counts, args.seed)
        reports[f"recorded in {args.observations}"] = _compare(policy, sets, args)
    else:
        image, config = policy.config.image, policy.vat.config
        sets = [
            realistic_samples(config, count, args.seed + place, image.mean, image.std)
            for place, count in enumerate(counts)
        ]
        reports["made pictures"] = _compare(policy, sets, args)
        plant_outliers(policy.vat)  # type: ignore[arg-type]
        reports["made pictures, outlier channels planted"] = _compare(policy, sets, args)
    accepted = all(report.accepted for report in reports.values())
    if args.json:
        found = [{"inputs": inputs, **report.to_dict()} for inputs, report in reports.items()]
        print(json.dumps({"checkpoint": str(args.checkpoint), "accepted": accepted, "reports": found}, indent=2))
    else:
        for inputs, report in reports.items():
            print(f"{inputs}: {report}")
    return 0 if accepted else 1


def _compare(policy: Policy, sets: list[Samples], args: argparse.Namespace) -> GateReport:
    """The gate's report for the policy's model as it is now, on the first set, calibrated on the second."""
    from tqdm import tqdm

    from vat_fast.frozen.gate import accept

    vat: Any = policy.vat
    samples, calibration = sets[0], sets[1] if len(sets) > 1 else None
    frozen = vat.freeze(
        dtype=args.dtype, device=args.device, executor=args.executor, calibration=calibration, record_layers=True
    )
    shown = tqdm(samples, desc=f"comparing {args.dtype}", unit="sample", mininterval=5, disable=args.json)
    return accept(vat, frozen, shown, policy.statistics)


class Frame(NamedTuple):
    """One recorded observation."""

    images: dict[str, NDArray[np.uint8]]
    """Camera -> (H, W, 3)."""
    state: NDArray[np.float32] | None
    task: str


def recorded_samples(path: Path, policy: Policy, counts: Sequence[int], seed: int = 0) -> list[Samples]:
    """Sets of recorded observations as `VAT` takes them, of so many samples each, no two of one episode where possible.

    Args:
        path: a packed dataset, or LIBERO's HDF5, a file or a folder.
        policy: whose cameras, images, statistics and tasks apply.
        counts: samples of each set.
        seed: of the choice.

    Raises:
        ValueError: nothing that can be read, too few observations, or other cameras or tasks than the policy's.
    """
    from vat_fast.train.data.libero_hdf5 import find_files
    from vat_fast.train.data.packed import MANIFEST

    if (path / MANIFEST).is_file():
        return _packed_samples(path, policy, counts, seed)
    if path.exists() and find_files(path):
        return _hdf5_samples(path, policy, counts, seed)
    what = "is neither a packed dataset nor LIBERO's HDF5; make one of it with vat-fast data pack"
    raise ValueError(f"{path} {what if path.exists() else 'does not exist'}")


def _packed_samples(path: Path, policy: Policy, counts: Sequence[int], seed: int) -> list[Samples]:
    from vat_fast.train.data.packed import PackedDataset

    data = PackedDataset(path)
    # Packing has turned the images and put them through JPEG.
    image = dataclasses.replace(policy.config.image, rotation="none", jpeg_quality=None)

    def frames(chosen: Mapping[int, list[int]]) -> Iterator[Frame]:
        for index, steps in chosen.items():
            episode = data.episodes[index]
            for step in (episode.start + step for step in steps):
                state = None if data.state is None else data.state[step]
                yield Frame({camera: data.image(camera, step) for camera in data.cameras}, state, episode.task)

    lengths = [episode.length for episode in data.episodes]
    return [_samples(frames(c), policy, image, list(data.cameras), data.tasks) for c in _choose(lengths, counts, seed)]


def _hdf5_samples(path: Path, policy: Policy, counts: Sequence[int], seed: int) -> list[Samples]:
    from vat_fast.train.data.libero_hdf5 import LiberoHDF5

    source = LiberoHDF5(path)
    episodes = list(source.episodes())  # images are read when they are asked for

    def frames(chosen: Mapping[int, list[int]]) -> Iterator[Frame]:
        for index, steps in chosen.items():
            episode = episodes[index]
            views = {
                camera: [im for t, im in enumerate(read()) if t in steps] for camera, read in episode.images.items()
            }
            for place, step in enumerate(steps):
                images: Any = {camera: found[place] for camera, found in views.items()}
                yield Frame(images, None if episode.state is None else episode.state[step], episode.task)

    lengths = [len(episode) for episode in episodes]
    chosen = _choose(lengths, counts, seed)
    return [_samples(frames(c), policy, policy.config.image, list(source.cameras), None) for c in chosen]


def _choose(lengths: Sequence[int], counts: Sequence[int], seed: int) -> list[dict[int, list[int]]]:
    """For each count: episode -> steps in order. Episodes are dealt out to the sets; of a single one, its steps are.

    Raises:
        ValueError: fewer observations than asked for.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    order = [int(i) for i in rng.permutation(len(lengths)) if lengths[i]]
    sets = []
    for place, count in enumerate(counts):
        if len(order) >= len(counts):
            pool = [(i, step) for i in order[place :: len(counts)] for step in range(lengths[i])]
        else:
            pool = [(i, step) for i in order for step in range(place, lengths[i], len(counts))]
        if len(pool) < count:
            raise ValueError(
                f"{count} observations are asked for, but there are {len(pool)}; lower --samples or --calibration"
            )
        chosen: dict[int, list[int]] = {}
        for at in rng.choice(len(pool), count, replace=False):
            chosen.setdefault(pool[at][0], []).append(pool[at][1])
        sets.append({index: sorted(steps) for index, steps in chosen.items()})
    return sets


def _samples(
    frames: Iterator[Frame], policy: Policy, image: Any, cameras: list[str], tasks: Mapping[str, int] | None
) -> Samples:
    """Frames as a model takes them; cameras by their names or, where those differ, in their order."""
    import numpy as np
    import torch

    from vat_fast.observation import ObservationProcessor

    own, model = policy.config.cameras, policy.vat.config
    if not set(own) <= set(cameras) and len(own) != len(cameras):
        raise ValueError(f"the policy looks through {', '.join(own)}, the observations have {', '.join(cameras)}")
    names = dict(zip(own, own if set(own) <= set(cameras) else cameras, strict=True))
    if policy.config.tasks is None and tasks is None and model.task_conditioning != "none":
        raise ValueError("this policy has no task table, so the file's instruction has no id; pack the file first")
    proprio = policy.statistics.proprio if model.proprio_dim else None
    process, samples = ObservationProcessor(image, own, proprio), []
    for frame in frames:
        observation: dict[str, Any] = {name: frame.images[there] for name, there in names.items()}
        if frame.state is not None:
            observation["state"] = frame.state
        found = process(observation)
        sample = {"pixels": torch.from_numpy(found.pixels)[None]}
        if model.task_conditioning != "none":
            task_id = tasks[frame.task] if policy.config.tasks is None and tasks is not None else None
            sample["task_id"] = torch.tensor([policy.task_id(frame.task if task_id is None else task_id)])
        if found.proprio is not None:
            sample["proprio"] = torch.from_numpy(np.asarray(found.proprio, np.float32))[None]
        samples.append(sample)
    return samples
