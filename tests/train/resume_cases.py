"""Runs that stop half-way and go on, in every way of sharding: `torchrun --nproc_per_node 2 resume_cases.py FOLDER`.

Of each case FOLDER/CASE/whole is a run that nothing disturbed, and FOLDER/CASE/parted the same one as a kill after
step 2 would have left it, and then resumed.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from torch import distributed as dist

from vat_fast.train import launch
from vat_fast.train.config import Config, config_from_dict
from vat_fast.train.run import Run

SIZE = {"image_size": 32, "depth": 3, "num_tasks": 2}  # two vision blocks: one with linears, and its reader
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 0": (0, {"precision": "fp32", "ema": 0.9}),
    "stage 2": (2, {"precision": "fp32"}),
    "stage 3": (3, {"precision": "fp32", "ema": 0.9, "lora": {"rank": 2}, "clip": 1.0}),
    "stage 1, bf16": (1, {"precision": "bf16"}),
    "stage 3, bf16": (3, {"precision": "bf16", "layer_decay": 0.5}),
    "stage 3, bf16, average": (3, {"precision": "bf16", "ema": 0.9}),
}
"""Of each: the ZeRO stage, and keys of `train`."""
STEPS, KILLED_AFTER = 4, 2


def make_config(folder: Path, case: str, name: str) -> Config:
    stage, train = CASES[case]
    return config_from_dict(
        {
            "output": str(folder / case / name),
            "model": {"preset": "vit-tiny", "weights": "random", "options": SIZE},
            "data": {
                "paths": [str(folder / "demonstrations")],
                "packed": str(folder / "packed"),
                "synthetic": {"demos": 4, "steps": 16, "image_size": 32},
                "workers": 0,
                "holdout": 0.0,
            },
            "train": {"steps": STEPS, "global_batch": 8, "lr": 1e-3, **train},
            "zero": {"stage": stage},
            "validate": {"every": None},
            "checkpoint": {"every": KILLED_AFTER},
            "log": {"every": 1, "tensorboard": False},
        }
    )


def part(folder: Path, case: str, name: str) -> None:
    """The run `whole` as it would be, had it been killed after its first checkpoint, as another run."""
    target = folder / case / name
    shutil.copytree(folder / case / "whole", target)
    shutil.rmtree(target / "checkpoints" / f"step-{STEPS:08d}")
    shutil.rmtree(target / "policy")


def main(folder: Path) -> None:
    with launch.start(threads=1) as place:
        for case in CASES:
            assert Run(make_config(folder, case, "whole"), place).train() == 0
            if place.rank == 0:
                part(folder, case, "parted")
            dist.barrier()
            assert Run(make_config(folder, case, "parted"), place).train() == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
