"""train/main.py with an accident: `deepspeed tests/train/faults.py ACCIDENT --config ...`.

kill-in-save-N: rank 1 is killed while it writes the checkpoint of step N, when half of its file is there.
kill-in-step-N: rank 0 is killed between the backward of step N and its optimiser.
full-disk-N: from step N on no file of rank 1 may grow above 64 KiB.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch


def kill_in_save(step: int) -> None:
    save = torch.save

    def broken(content: Any, file: Any, *args: Any, **options: Any) -> None:
        save(content, file, *args, **options)
        if os.environ["RANK"] == "1" and f"step-{step:08d}" in str(file):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = broken


def kill_in_step(step: int) -> None:
    before_optimizer(step, lambda: os.kill(os.getpid(), signal.SIGKILL), rank="0")


def full_disk(step: int) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, resource.RLIM_INFINITY))

    before_optimizer(step, limit, rank="1")


def before_optimizer(step: int, act: Callable[[], Any], rank: str) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    original = DeepSpeedEngine.step

    def stepping(self: Any, *args: Any, **options: Any) -> Any:
        if os.environ["RANK"] == rank and self.global_steps == step - 1:
            act()
        return original(self, *args, **options)

    DeepSpeedEngine.step = stepping


ACCIDENTS = {"kill-in-save": kill_in_save, "kill-in-step": kill_in_step, "full-disk": full_disk}

if __name__ == "__main__":
    from vat_fast.train.main import main

    accident = next(argument for argument in sys.argv[1:] if argument.startswith(tuple(ACCIDENTS)))
    name, _, when = accident.rpartition("-")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    ACCIDENTS[name](int(when))
    sys.exit(main([argument for argument in sys.argv[1:] if argument != accident]))
