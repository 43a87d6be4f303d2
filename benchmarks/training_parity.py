"""Training under DeepSpeed against plain PyTorch, loss by loss.

The training loop runs with ZeRO 1, 2 and 3 on two ranks; `ReferenceVAT` with PyTorch's AdamW and LambdaLR runs on one
process, on the same batches of the same demonstrations.

    OMP_NUM_THREADS=1 python -m benchmarks.training_parity      # docs/training_parity.json and .png
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import socket
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.loader import cpu_name
from vat_fast.files import write_text
from vat_fast.reference import ReferenceVAT
from vat_fast.train import launch
from vat_fast.train.build import build_model
from vat_fast.train.config import Config, config_from_dict
from vat_fast.train.datasets import open_data, prepare_paths
from vat_fast.train.loop import Trainer

RANKS = 2


def make_config(folder: Path, steps: int, stage: int, preset: str, precision: str) -> Config:
    """The same run for every stage."""
    return config_from_dict(
        {
            "output": str(folder / "run"),
            "model": {"preset": preset, "weights": "random", "options": {"image_size": 64, "num_tasks": 2}},
            "data": {
                "paths": [str(folder / "demonstrations")],
                "packed": str(folder / "packed"),
                "synthetic": {"demos": 8, "steps": 24, "image_size": 64},
                "workers": 0,
                "holdout": 0.0,
            },
            "train": {"steps": steps, "global_batch": 8, "lr": 1e-4, "precision": precision},
            "zero": {"stage": stage, "bucket": 1_000_000},
            "validate": {"every": None},
        }
    )


def reference_losses(config: Config, steps: int) -> list[float]:
    """Plain PyTorch: the yardstick model, AdamW at its defaults, the authors' schedule; one process."""
    config = config.resolve(1)
    paths = prepare_paths(config, is_first=True)
    vat = build_model(config)
    model = ReferenceVAT(vat.config)
    model.load_state_dict(vat.state_dict())
    loader = open_data(config, vat.config, paths, 0, 1).train
    peak, final = config.train.lr, config.train.final_lr
    warmup = int(steps * config.train.warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        return final / peak + (1 - final / peak) * cosine

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    for _ in tqdm(range(steps), desc="plain PyTorch", unit="step"):
        batch = loader.prepare(next(loader))
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "autocast"):
            prediction = model(batch["pixels"], batch["task_id"])
        loss = F.l1_loss(prediction.float(), batch["actions"])
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_rank(folder: Path, steps: int, stage: int, preset: str, precision: str) -> None:
    """One rank of a run under DeepSpeed; the first writes the losses, means over the ranks."""
    config = make_config(folder, steps, stage, preset, precision)
    with launch.start(threads=1) as place:
        config = config.resolve(place.world_size)
        paths = prepare_paths(config, place.rank == 0)
        vat = build_model(config)
        loader = open_data(config, vat.config, paths, place.rank, place.world_size).train
        trainer = Trainer(config, vat, steps, place.device, place.rank)
        losses = []
        for _ in range(steps):
            loss = trainer.train_step(loader).loss
            dist.all_reduce(loss)
            losses.append(loss.item() / place.world_size)
        if place.rank == 0:
            write_text(folder / f"zero{stage}.json", json.dumps(losses))


def start_ranks(folder: Path, steps: int, stage: int, preset: str, precision: str) -> list[float]:
    """The losses of a run on `RANKS` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(folder), "--steps", str(steps), "--preset", preset, "--precision", precision]
    command = [sys.executable, "-m", "benchmarks.training_parity", "--stage", str(stage), "--folder", *arguments]
    common = {**os.environ, "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(RANKS)]
    ranks = [subprocess.Popen(command, env={**common, **place}) for place in places]
    for rank in ranks:
        rank.wait()
    # The first rank writes this behind its last step; what happens while processes end does not matter here.
    if not (folder / f"zero{stage}.json").exists():
        raise RuntimeError(f"the run with ZeRO-{stage} failed, see above")
    losses: list[float] = json.loads((folder / f"zero{stage}.json").read_text())
    return losses


def plot(losses: dict[str, list[float]], differences: dict[str, list[float]], path: Path) -> None:
    """Losses above, relative differences below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    for (name, values), style in zip(losses.items(), ("-", "--", "-.", ":"), strict=False):
        top.plot(range(1, len(values) + 1), values, style, label=name)
    for name, values in differences.items():
        bottom.semilogy(range(1, len(values) + 1), [max(v, 1e-9) for v in values], label=name)
    top.set_ylabel("L1 loss")
    top.legend()
    bottom.set_ylabel("relative difference from plain PyTorch")
    bottom.set_xlabel("optimiser step")
    bottom.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Run plain PyTorch and every stage, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--preset", default="vit-tiny")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "autocast"))
    parser.add_argument("--out", type=Path, default=Path("docs/training_parity.json"))
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)  # of one rank, which this script starts
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    options = (args.steps, args.stage, args.preset, args.precision)
    if args.stage is not None:
        run_rank(args.folder, *options)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = make_config(folder, args.steps, 1, args.preset, args.precision)
        losses = {"plain PyTorch": reference_losses(config, args.steps)}
        for stage in (1, 2, 3):
            losses[f"ZeRO-{stage}"] = start_ranks(folder, args.steps, stage, args.preset, args.precision)
    plain = losses["plain PyTorch"]
    differences = {
        name: [abs(a - b) / abs(b) for a, b in zip(values, plain, strict=True)]
        for name, values in losses.items()
        if values is not plain
    }
    result: dict[str, Any] = {
        "conditions": {
            "cpu": cpu_name(),
            "preset": f"{args.preset} at 64 pixels",
            "precision": args.precision,
            "steps": args.steps,
            "global_batch": config.train.global_batch,
            "ranks": RANKS,
            "threads_per_rank": 1,
            "seed": config.seed,
            "python": platform.python_version(),
            "packages": {name: version(name) for name in ("torch", "deepspeed", "numpy")},
        },
        "worst_relative_difference": {name: max(values) for name, values in differences.items()},
        "losses": losses,
    }
    write_text(args.out, json.dumps(result, indent=2) + "\n")
    plot(losses, differences, args.out.with_suffix(".png"))
    print(f"loss {plain[0]:.4f} at the first step, {plain[-1]:.4f} at the last")
    for name, values in differences.items():
        print(f"{name}: worst relative difference of the loss {max(values):.2g}")


if __name__ == "__main__":
    main()
