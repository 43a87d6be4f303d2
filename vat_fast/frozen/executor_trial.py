"""Which executor is fastest for a model on this CPU: two of its layers, timed once and kept.

No rule by instruction set or width held on all processors that were measured (docs/performance.md), and a user's may be
none of those. The answer is kept under `native.library.cache_folder`, by processor, threads, versions, precision and
the model's sizes, so that the next start takes the same executor at once.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vat_fast.config import VATConfig
from vat_fast.files import keep_first
from vat_fast.frozen.target import Executor, Precision
from vat_fast.native import library

LAYERS = 2
SMALLEST_WIDTH = 128
"""Narrower models are for tests; a trial would take longer than all their steps."""
MARGIN = 1.05
"""Times faster that an executor must be to be taken before one that needs less memory: the trial's own noise."""
_ROUNDS, _SECONDS = (5, 40), 0.5


def milliseconds(config: VATConfig, dtype: Precision, executors: Sequence[Executor]) -> dict[str, float]:
    """Median milliseconds of a step of one sample through `LAYERS` layers, by executor; measured at the first call."""
    conditions = _conditions(config, dtype, executors)
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:16]
    path = library.cache_folder() / f"executors-{key}.json"
    if path.exists():
        return json.loads(path.read_text())["ms"]
    return json.loads(_measured(path, config, dtype, executors, conditions))["ms"]


def choose(taken: Mapping[str, float]) -> str:
    """Of executors in the order of the memory they need, the first that no other beats by more than `MARGIN`."""
    fastest = min(taken.values())
    return next(name for name, ms in taken.items() if ms <= MARGIN * fastest)


def _measured(
    path: Path, config: VATConfig, dtype: Precision, executors: Sequence[Executor], conditions: Mapping[str, Any]
) -> str:
    print("vat_fast: timing executors for this model on this processor, once", file=sys.stderr, flush=True)
    steps = _steps(shortened(config), dtype, executors)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS[1]):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            taken[name].append(1e3 * (time.perf_counter() - start))
        done = len(next(iter(taken.values())))
        if done >= _ROUNDS[0] and sum(map(sum, taken.values())) > 1e3 * _SECONDS * len(steps):
            break
    medians = {name: round(statistics.median(times[1:]), 3) for name, times in taken.items()}
    return keep_first(path, json.dumps({"ms": medians, "of": conditions}, indent=1) + "\n")


def shortened(config: VATConfig) -> VATConfig:
    """The same widths and tokens in `LAYERS` layers, and one pass where a diffusion head samples many."""
    depth = min(config.depth, LAYERS + 1)
    return config.replace(depth=depth, num_layers=min(config.layers, depth - 1), head="l1")


def _steps(config: VATConfig, dtype: Precision, executors: Sequence[Executor]) -> dict[str, Callable[[], Tensor]]:
    from vat_fast.model import VAT

    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        vat = VAT(config)
        for parameter in vat.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02)
        size = config.image_size
        inputs: dict[str, Any] = {"pixels": torch.randn(1, config.num_views, 3, size, size)}
        if config.task_conditioning != "none":
            inputs["task_id"] = 0
        if config.proprio_dim:
            inputs["proprio"] = torch.randn(1, config.proprio_dim)
        samples = [{**inputs, "task_id": torch.tensor([0])} if "task_id" in inputs else inputs]
        calibration = samples if dtype == "int8" else None
        frozen = {name: vat.freeze(dtype=dtype, executor=name, calibration=calibration) for name in executors}
    return {name: functools.partial(one, **inputs) for name, one in frozen.items()}


def _conditions(config: VATConfig, dtype: Precision, executors: Sequence[Executor]) -> dict[str, Any]:
    """What the answer depends on."""
    versions = {"torch": str(torch.__version__)}
    if "openvino" in executors:
        versions["openvino"] = importlib.metadata.version("openvino")
    if "native" in executors:
        versions["native"] = library.path().stem
    return {
        "model": dataclasses.asdict(shortened(config)),
        "dtype": dtype,
        "executors": list(executors),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "processor": hashlib.sha256(library.processor().encode()).hexdigest()[:16],
    }
