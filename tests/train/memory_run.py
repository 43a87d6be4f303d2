"""How much memory a few training steps take in a process of their own: `memory_run.py FOLDER STAGE PRECISION`.

Prints JSON: `baseline`, bytes resident once a much smaller model has trained, so that libraries and buffers that do
not depend on the model are there; `peak`, the most while the model trained; `estimate`, of `vat_fast.train.estimate`.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from pathlib import Path
from typing import Any

from vat_fast.train import launch
from vat_fast.train.build import build_model
from vat_fast.train.config import config_from_dict
from vat_fast.train.datasets import open_data, prepare_paths
from vat_fast.train.estimate import TrainingPlan, estimate
from vat_fast.train.loop import Trainer

SMALL = {"image_size": 64, "patch_size": 16, "width": 48, "depth": 2, "num_heads": 3, "mlp_hidden": 96, "num_tasks": 2}
LARGE = {**SMALL, "width": 480, "depth": 5, "num_heads": 6, "mlp_hidden": 1920}
BATCH = 8


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def train(folder: Path, options: dict[str, Any], stage: int, precision: str, place: launch.Place) -> Any:
    values = {
        "output": str(folder / "run"),
        "model": {"preset": "vit-tiny", "weights": "random", "options": options},
        "data": {
            "paths": [str(folder / "demonstrations")],
            "packed": str(folder / "packed"),
            "synthetic": {"demos": 2, "steps": 16, "image_size": 64},
            "workers": 0,
            "holdout": 0.0,
        },
        "train": {"steps": 3, "global_batch": BATCH, "precision": precision},
        "zero": {"stage": stage},
        "validate": {"every": None},
    }
    config = config_from_dict(values).resolve(1)
    vat = build_model(config)
    data = open_data(config, vat.config, prepare_paths(config, is_first=True), 0, 1)
    trainer = Trainer(config, vat, 3, place.device, 0)
    for _ in range(3):
        trainer.train_step(data.train)
    return vat.config


def main(folder: Path, stage: int, precision: Any) -> None:
    # What a run takes, not what the allocator keeps for it (a quarter more here).
    launch.keep_freed_memory = lambda: False
    with launch.start(threads=1) as place:
        train(folder, SMALL, stage, precision, place)
        gc.collect()
        baseline = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        model = train(folder, LARGE, stage, precision, place)
        plan = TrainingPlan(ranks=1, zero=stage, micro_batch=BATCH, precision=precision, kind="cpu")
        expected = estimate(model, plan).to_dict()
        print(json.dumps({"baseline": baseline, "peak": status("VmHWM"), "estimate": expected}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
