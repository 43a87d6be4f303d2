"""One fresh process of `benchmarks.cold_start`: it imports nothing before its clock runs.

    python -m benchmarks.cold_child FOLDER WHO BORN

Prints one line of JSON, the fields of `Start`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WHO = ("reference fp32", "frozen fp32", "frozen bf16", "frozen int16", "frozen int8")
CALIBRATION = 32
"""Samples that int8 takes its ranges from, where its executor needs them: part of its freezing."""


@dataclass(frozen=True)
class Start:
    """One fresh process: seconds of each part, and megabytes."""

    import_s: float
    """Of torch, vat_fast and what the model needs."""
    load_s: float
    """Of the saved policy."""
    freeze_s: float
    """Folding, packing, compiling, calibrating where that is needed; 0 for the reference."""
    first_step_s: float
    """Raw camera images to robot actions, for the first time."""
    second_step_s: float
    total_s: float
    """From the process's birth to the first action: the interpreter's own start is in it, the second step is not."""
    peak_mb: float
    """Largest resident memory of the process."""
    ready_mb: float
    """Resident memory behind the steps."""


def start_here(folder: str, who: str, born: float) -> Start:
    """Do it in this process, which should have done nothing yet.

    Args:
        folder: of a saved policy.
        who: one of `WHO`.
        born: seconds since the epoch when this process was started.
    """
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    import psutil
    import torch

    from vat_fast.cli import _sample_images
    from vat_fast.policy import Policy

    import_s = lap()
    policy = Policy.from_pretrained(folder, dtype=torch.float32, frozen=False)
    vat: Any = policy.vat
    if who.startswith("reference"):
        from vat_fast.reference import ReferenceVAT
        from vat_fast.without_values import without_values

        with without_values():
            reference = ReferenceVAT(vat.config).eval()
        reference.load_state_dict(vat.state_dict(), assign=True)
        policy.vat = reference  # the same signature
    load_s, dtype = lap(), who.split()[-1]
    if who.startswith("frozen"):
        options: dict[str, Any] = {}
        if dtype == "int8":
            from vat_fast.frozen.cpu import cpu_executor

            if cpu_executor("int8", vat.config, calibrated=False).executor == "openvino":
                from vat_fast.frozen.gate_inputs import realistic_samples

                options["calibration"] = realistic_samples(vat.config, CALIBRATION)
        policy = Policy(vat.freeze(dtype=dtype, **options), policy.config, policy.statistics)
    del vat
    freeze_s = lap()
    observation = dict(zip(policy.config.cameras, _sample_images(policy.vat.config.num_views), strict=True))
    policy.act(observation, 0)
    first_step_s, total_s = lap(), time.time() - born
    policy.act(observation, 0)
    second_step_s, resident = lap(), psutil.Process().memory_info().rss
    return Start(
        import_s, load_s, freeze_s, first_step_s, second_step_s, total_s, peak_kilobytes() / 2**10, resident / 2**20
    )


def peak_kilobytes() -> int:
    """Largest resident memory of this process so far.

    Not ru_maxrss where the kernel says it otherwise: that also counts the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 1024 if sys.platform == "darwin" else peak


if __name__ == "__main__":
    print(json.dumps(asdict(start_here(sys.argv[1], sys.argv[2], float(sys.argv[3])))))
