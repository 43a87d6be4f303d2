"""Samples per second of the training loop, against a plain loop on the same demonstrations.

    python -m benchmarks.training_speed    # prints a table and writes docs/training_speed*.json

The plain loop is what one would write: `ReferenceVAT` under autocast, PyTorch's AdamW, a `DataLoader` whose workers
read LIBERO's HDF5 and augment with torchvision. Ours is `train/configs/vit_tiny_cpu.yaml` on the same file, packed
before. Model, batch, precision and augmentation are equal. Each loop lives in processes of its own, which wait while
the others work; they take turns in blocks of steps, and the first steps of a block are not timed: they use up what
workers had prepared while they waited.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped, unused-ignore]
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from benchmarks.interleave import conditions, summarise
from benchmarks.loader import demonstrations
from tests.train import makers
from vat_fast.files import write_text
from vat_fast.observation import IMAGENET_MEAN, IMAGENET_STD
from vat_fast.precision import multiplies_bfloat16
from vat_fast.reference import ReferenceVAT
from vat_fast.train import launch
from vat_fast.train.build import build_model
from vat_fast.train.config import Config, load_config
from vat_fast.train.datasets import open_data, prepare_paths
from vat_fast.train.loop import Trainer

CONFIG = Path("train/configs/vit_tiny_cpu.yaml")
GLOBAL_BATCH = 32
PRECISION = "autocast" if multiplies_bfloat16("cpu") else "fp32"
"""Of both loops: what is fastest on this processor."""
_KIND = ("" if PRECISION == "autocast" else f"_{PRECISION}") + (
    "" if torch.backends.cpu.get_cpu_capability() == "AVX512" else f"_{torch.backends.cpu.get_cpu_capability().lower()}"
)
RESULT = Path("docs", f"training_speed{_KIND}.json")
"""One for each kind of processor: in bf16 with AVX-512, in fp32 with it, in fp32 without."""
UNTIMED = 3
"""Steps at the front of a block: two batches wait in each worker's queue, one was being made."""
LOOPS = {
    "plain": ("plain loop, 1 process of 2 threads, 2 workers", 1),
    "plain_compiled": ("plain loop, model under torch.compile", 1),
    "ours_1": ("vat_fast, 1 rank of 2 threads, 2 workers", 1),
    "ours_2": ("vat_fast, 2 ranks of 1 thread, 1 worker each", 2),
}
"""Name -> what it is, and its processes."""
Step = Callable[[], float]
"""Takes one optimiser step and returns its loss."""


class PlainDemonstrations(Dataset[dict[str, Tensor]]):
    """LIBERO's HDF5 as it is: one sample is one step's two images, augmented, and the actions that follow.

    Args:
        file: of one task.
        image_size: of the samples.
    """

    cameras = ("agentview_rgb", "eye_in_hand_rgb")

    def __init__(self, file: Path, image_size: int) -> None:
        from torchvision.transforms import v2

        self.file, self._open = file, None
        with h5py.File(file, "r") as f:
            self.index = [(name, step) for name in f["data"] for step in range(len(f["data"][name]["actions"]))]
            actions = np.concatenate([f["data"][name]["actions"] for name in f["data"]])
        low, high = np.quantile(actions, 0.01, axis=0), np.quantile(actions, 0.99, axis=0)
        self.low, self.span = low, np.maximum(high - low, 1e-6)
        self.transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, scale=(0.9, 0.9), ratio=(1.0, 1.0), antialias=True),
                v2.ColorJitter(0.2, (0.8, 1.2), (0.8, 1.2), 0.05),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if self._open is None:  # in the worker: h5py's files do not survive being sent to another process
            self._open = h5py.File(self.file, "r")
        name, step = self.index[number]
        demo = self._open["data"][name]
        images = [np.ascontiguousarray(demo["obs"][camera][step][::-1, ::-1]) for camera in self.cameras]
        pixels = [self.transform(torch.from_numpy(image).permute(2, 0, 1)) for image in images]
        actions = demo["actions"][step : step + 8]
        actions = np.concatenate([actions, np.repeat(actions[-1:], 8 - len(actions), axis=0)])
        actions = np.clip(2 * (actions - self.low) / self.span - 1, -1, 1)
        return {"pixels": torch.stack(pixels), "actions": torch.from_numpy(actions).float()}


def plain_step(file: Path, config: Config, compiled: bool) -> Step:
    """The plain loop's step."""
    vat = build_model(config)
    model: Any = ReferenceVAT(vat.config)
    model.load_state_dict(vat.state_dict())
    loader = DataLoader(
        PlainDemonstrations(file, vat.config.image_size),
        batch_size=GLOBAL_BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )

    def endless() -> Iterator[dict[str, Tensor]]:
        while True:
            yield from loader

    batches = endless()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.train.lr)
    forward = torch.compile(model) if compiled else model
    task_id = torch.zeros(GLOBAL_BATCH, dtype=torch.int64)

    def step() -> float:
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "autocast"):
            prediction = forward(batch["pixels"], task_id)
        loss = F.l1_loss(prediction.float(), batch["actions"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(config: Config, place: Any) -> Step:
    """The training loop's step on this rank."""
    config = config.resolve(place.world_size)
    paths = prepare_paths(config, place.rank == 0)
    vat = build_model(config)
    loader = open_data(config, vat.config, paths, place.rank, place.world_size).train
    trainer = Trainer(config, vat, 10_000, place.device, place.rank)
    return lambda: float(trainer.train_step(loader).loss)


def configure(folder: Path, workers: int) -> Config:
    """The shipped configuration, on the demonstrations in `folder`."""
    return load_config(
        CONFIG,
        [
            f"output={folder / 'run'}",
            f"data.paths=[{folder / 'hdf5'}]",
            f"data.packed={folder / 'packed'}",
            "data.synthetic=null",
            "model.options={num_tasks: 10}",
            "data.holdout=0.0",
            "validate.every=null",
            f"data.workers={workers}",
            f"train.global_batch={GLOBAL_BATCH}",
            f"train.precision={PRECISION}",
        ],
    )


def work(loop: str, folder: Path) -> None:
    """A process of one loop: for every number on standard input, take so many steps and say how long they took."""
    torch.manual_seed(0)
    if loop.startswith("plain"):
        file = next((folder / "hdf5").glob("*.hdf5"))
        _answer(plain_step(file, configure(folder, 0), loop == "plain_compiled"))
        return
    ranks = LOOPS[loop][1]
    with launch.start(threads=2 // ranks) as place:
        _answer(our_step(configure(folder, 2 // ranks), place))


def _answer(step: Step) -> None:
    print(json.dumps({"loss": step()}), flush=True)  # ready
    for line in sys.stdin:
        losses = [step() for _ in range(UNTIMED)]
        start = time.perf_counter()
        losses += [step() for _ in range(int(line))]
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": losses[-1]}), flush=True)


class Loop:
    """The processes of one loop, as seen from outside."""

    def __init__(self, name: str, folder: Path) -> None:
        ranks = LOOPS[name][1]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command = [sys.executable, "-m", "benchmarks.training_speed", "--work", name, "--folder", str(folder)]
        self._ranks = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(2 // ranks),
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                    **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                },
            )
            for rank in range(ranks)
        ]
        self.losses = [answer["loss"] for answer in self._read()]

    def run(self, steps: int) -> float:
        """Seconds of so many steps, of the slowest rank."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(f"{steps}\n")
            rank.stdin.flush()
        answers = self._read()
        self.losses = [answer["loss"] for answer in answers]
        return max(answer["seconds"] for answer in answers)

    def close(self) -> None:
        """End the processes."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self._ranks:
            rank.wait(60)

    def _read(self) -> list[dict[str, float]]:
        answers = []
        for rank in self._ranks:
            assert rank.stdout is not None
            # Libraries print to standard output too.
            line = next((line for line in rank.stdout if line.startswith("{")), None)
            if line is None:
                raise RuntimeError(f"a loop ended with status {rank.wait()}, see above")
            answers.append(json.loads(line))
        return answers


def measure(names: list[str], rounds: int, steps: int, folder: Path, episodes: int = 12) -> dict[str, Any]:
    """Rates of the loops, in turns, and how many times the first one's they are."""
    makers.write_libero(
        folder / "hdf5" / "turn_on_the_stove_demo.hdf5", demonstrations(episodes, 100), observation_before_action=True
    )
    config = configure(folder, 0)
    prepare_paths(config, is_first=True)
    loops = {}
    for name in tqdm(names, desc="starting", unit="loop"):
        loops[name] = Loop(name, folder)
        loops[name].run(2)  # compiles, allocates
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(rounds), unit="round"):
        for name, loop in loops.items():
            seconds[name].append(loop.run(steps))
    rows = {}
    for name, loop in loops.items():
        timing = summarise([1e3 * s for s in seconds[name]], [1e3 * s for s in seconds[names[0]]])
        rows[name] = {
            "what": LOOPS[name][0],
            "samples_per_s": round(1e3 * steps * GLOBAL_BATCH / timing.p50_ms, 2),
            "ratio": round(timing.ratio, 3),
            "ratio_p10_p90": [round(timing.ratio_low, 3), round(timing.ratio_high, 3)],
            "loss": round(sum(loop.losses) / len(loop.losses), 4),
        }
        loop.close()
    return rows


def main() -> None:
    """The command line."""
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_speed", description=summary)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a block (default 6)")
    parser.add_argument("--loops", default=",".join(LOOPS), help="the first is what the others are compared with")
    parser.add_argument("--work", choices=list(LOOPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.folder)
        return
    started = conditions(0)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.loops.split(","), options.rounds, options.steps, Path(folder))
    for row in rows.values():
        low, high = row["ratio_p10_p90"]
        print(f"{row['what']:50} {row['samples_per_s']:7.1f} samples/s  {row['ratio']:.2f}x ({low:.2f} to {high:.2f})")
    result = {
        "command": " ".join(["python -m benchmarks.training_speed", *sys.argv[1:]]),
        "model": f"vit-tiny, 224 pixels, 2 views, {PRECISION}",
        "global_batch": GLOBAL_BATCH,
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "loops": rows,
        "conditions": started,
    }
    write_text(RESULT, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
