"""Many steps of a frozen policy in a row: does memory grow, and how far is the slow step from the median?

python -m benchmarks.soak                     10,000 steps of vit-tiny in each precision
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm import tqdm

from benchmarks.interleave import conditions
from benchmarks.step import DTYPES, RESULTS, save
from benchmarks.variants import random_batch, randomise
from vat_fast import VAT, VATConfig

MOST_GROWTH_MB = 8.0
"""Over a whole run; allocators keep a few pages more or less."""
MOST_P99 = 1.3
"""Times p50, on a quiet machine."""


@dataclass(frozen=True)
class Soak:
    """What a run showed. Memory is resident; first_mb and last_mb are medians of the first and last tenth."""

    steps: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    worst_ms: float
    first_mb: float
    last_mb: float
    growth_mb: float
    machine_p99_over_p50: float | None = None
    """Of plain matrix products that take as long as a step: how unsteady the machine itself was, just after."""

    @property
    def failures(self) -> list[str]:
        """Which limits it broke, in words."""
        found = []
        if self.growth_mb > MOST_GROWTH_MB:
            found.append(f"memory grows: {self.growth_mb:.1f} MB over {self.steps} steps, limit {MOST_GROWTH_MB:g}")
        if self.p99_ms > MOST_P99 * self.p50_ms:
            found.append(f"p99 is {self.p99_ms / self.p50_ms:.2f} times p50, limit {MOST_P99:g}")
            if self.machine_p99_over_p50 is not None:
                found[-1] += f"; for plain matrix products of that length it is {self.machine_p99_over_p50:.2f} times"
        return found


def soak(step: Callable[[], Any], steps: int, warm_up: int = 100, progress: bool = True) -> Soak:
    """Run `step` often.

    Raises:
        ValueError: too few steps to compare the first tenth with the last.
    """
    if steps < 10:
        raise ValueError(f"a soak needs at least 10 steps, got {steps}")
    process = psutil.Process()
    times, memory = [], []
    with torch.inference_mode():
        for _ in range(warm_up):
            step()
        for _ in tqdm(range(steps), mininterval=10, unit="step", disable=not progress):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
            memory.append(process.memory_info().rss / 2**20)
    p50, p90, p99 = (float(p) for p in np.percentile(times, [50, 90, 99]))
    tenth = steps // 10
    # A line through all of it: the two ends alone would see an allocator's saw teeth.
    growth = float(np.polyfit(range(steps), memory, 1)[0]) * steps
    first, last = float(np.median(memory[:tenth])), float(np.median(memory[-tenth:]))
    return Soak(steps, p50, p90, p99, max(times), first, last, growth)


def unsteadiness(milliseconds: float, runs: int = 1000) -> float:
    """p99 / p50 of a fixed number of matrix products in all threads that take about so long, weights in the cache."""
    x, w, y = (torch.randn(512, 512) for _ in range(3))

    def products(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(x, w, out=y)
        return 1e3 * (time.perf_counter() - start)

    one = float(np.median([products(10) for _ in range(20)])) / 10
    count = max(round(milliseconds / one), 1)
    p50, p99 = np.percentile([products(count) for _ in range(runs)], [50, 99])
    return round(float(p99 / p50), 2)


def frozen_step(config: VATConfig, dtype: str, seed: int = 0) -> Callable[[], Any]:
    """One step of a frozen VAT with random weights, on random pixels."""
    vat = VAT(config).eval()
    randomise(vat, seed)
    inputs = random_batch(config, 1, seed + 1)
    options: dict[str, Any] = {"dtype": dtype}
    if dtype == "int8":
        samples = random_batch(config, 4, seed + 2)
        options["calibration"] = [{name: samples[name] for name in ("pixels", "task_id")}]
    frozen = vat.freeze(**options)
    return lambda: frozen(inputs["pixels"], inputs["task_id"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; status 1 if a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="vit-tiny")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), help=f"default: {' '.join(DTYPES)}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args(arguments)
    rows, broken = [], False
    for dtype in options.dtypes:
        found = soak(frozen_step(VATConfig.from_preset(options.preset), dtype), options.steps)
        found = replace(found, machine_p99_over_p50=unsteadiness(found.p50_ms, max(options.steps // 10, 10)))
        rows.append({"name": f"{options.preset}, frozen {dtype}", **asdict(found), "failures": found.failures})
        print(rows[-1], flush=True)
        broken = broken or bool(found.failures)
    save({"kind": "soak", "conditions": conditions(0), "rows": rows}, f"soak-{options.preset}", options.out)
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
