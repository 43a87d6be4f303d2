"""Timing rivals against a reference in the same rounds, so that a machine that slows down does so for all."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, and how many times faster than the reference in the same round."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int


def interleave(
    reference: Callable[[], Any], rivals: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 2
) -> tuple[dict[str, Timing], list[float]]:
    """(timing of each rival, milliseconds of the reference by round); a round runs the reference, then each rival."""
    own: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for index in range(warm_up + rounds):
        calls = [(own, reference), *((times[name], call) for name, call in rivals.items())]
        for kept, call in calls:
            start = time.perf_counter()
            call()
            if index >= warm_up:
                kept.append(1e3 * (time.perf_counter() - start))
    return {name: summarise(found, own) for name, found in times.items()}, own


def summarise(own: Sequence[float], reference: Sequence[float]) -> Timing:
    """Percentiles of one rival's milliseconds; the ratio's median and the range of 80 % of rounds.

    Raises:
        ValueError: the two were not timed in the same rounds.
    """
    if len(own) != len(reference) or not own:
        raise ValueError(f"rounds must pair up, got {len(own)} and {len(reference)}")
    ratios = np.asarray(reference) / np.asarray(own)
    p50, p90, p99 = np.percentile(own, [50, 90, 99])
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    return Timing(float(p50), float(p90), float(p99), float(middle), float(low), float(high), len(own))


def conditions(seed: int) -> dict[str, Any]:
    """Where, when and with what a result was measured."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    clock = psutil.cpu_freq()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.strip(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "clock_mhz": None if clock is None else round(clock.current),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "openvino", "onnxruntime", "numpy", "vat_fast")},
        "seed": seed,
    }
