"""The policy step on this CPU: every rival in the same rounds, errors first, results in a file with their conditions.

    python -m benchmarks.step                                       vit-tiny and so400m, one sample, two views
    python -m benchmarks.step --presets vit-small --batches 1 4 16 --views 1 2 3
    python -m benchmarks.step --waterfall                           what each pass brings, vit-tiny

Writes benchmarks/results/step-<preset>-B<batch>-V<views>.json (waterfall-<preset>.json).
`python -m benchmarks.report` makes docs/performance.md and the plots of what is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.floor import floor_ms
from benchmarks.interleave import conditions, interleave
from benchmarks.parity import relative
from benchmarks.rivals import REFERENCE, RIVALS, Problem, build
from vat_fast.files import write_text
from vat_fast.frozen.engine import FrozenVAT, make_plan
from vat_fast.frozen.passes import PASSES
from vat_fast.frozen.target import Target

RESULTS = Path(__file__).with_name("results")
ROUNDS = {"vit-tiny": 200, "vit-small": 60}
FEW_ROUNDS = 5
"""For models that take seconds."""
SLOW = ("torch.compile max-autotune fp32", "ONNX Runtime fp32")
"""Not run by default where building takes minutes and gigabytes: with the large presets."""


def measure(
    preset: str, batch: int, views: int, rounds: int, names: Sequence[str], whole: bool = True, seed: int = 0
) -> dict[str, Any]:
    """The result file's content for one shape; `whole`: also from camera images to robot actions."""
    where = conditions(seed)  # before the load is our own
    problem = Problem.make(preset, batch, views, seed)
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    references: list[float] = []
    # Of large models only a few at a time fit in memory; each group has rounds of the reference of its own.
    at_once = len(names) if preset in ROUNDS else 2
    for first in range(0, len(names), at_once):
        found, own = _group(problem, names[first : first + at_once], rounds, skipped)
        rows += [{**row, "samples_per_second": 1e3 * batch / row["p50_ms"]} for row in found]
        references += own
        gc.collect()
    floors = {}
    for dtype in ("fp32", "bf16", "int8"):
        milliseconds, rates = floor_ms(make_plan(problem.vat.config, batch, Target("torch", "fp32")), dtype)
        floors[dtype] = {"ms": milliseconds, "gflops_by_shape": rates}
    return {
        "kind": "step",
        "preset": preset,
        "batch": batch,
        "views": views,
        "conditions": where,
        "reference_p50_ms": float(np.median(references)),
        "rivals": rows,
        "skipped": skipped,
        "floor": floors,
        "end_to_end": end_to_end(problem, max(rounds // 4, 3)) if batch == 1 and whole else [],
    }


def _group(
    problem: Problem, names: Sequence[str], rounds: int, skipped: dict[str, str]
) -> tuple[list[dict[str, Any]], list[float]]:
    """(a row for each rival, the reference's milliseconds); a rival that cannot be built goes to `skipped`."""
    rivals = {}
    for name in names:
        try:
            rivals[name] = build(name, problem)
            print(f"  {name}: error {rivals[name].error:.1e}, built in {rivals[name].build_seconds:.1f} s", flush=True)
        except (ImportError, ArithmeticError, ValueError, RuntimeError) as error:
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(f"  {name} left out: {skipped[name]}", flush=True)
    if not rivals:
        return [], []
    with torch.inference_mode():
        calls = {name: rival.call for name, rival in rivals.items()}
        timings, own = interleave(lambda: problem.reference(problem.pixels, problem.task_id), calls, rounds)
    rows = []
    for name, rival in rivals.items():
        row = {"name": name, "dtype": rival.dtype, "error": rival.error, **asdict(timings[name])}
        rows.append({**row, "build_seconds": rival.build_seconds, "build_mb": rival.build_mb})
    return rows, own


def end_to_end(problem: Problem, rounds: int) -> list[dict[str, Any]]:
    """From raw camera images to robot actions through `Policy`: VAT, and frozen in each precision."""
    from vat_fast.cli import _sample_images, _unit_statistics
    from vat_fast.observation import ImageProcessing
    from vat_fast.policy import Policy, PolicyConfig

    config = problem.vat.config
    cameras = tuple(f"camera_{view}" for view in range(config.num_views))
    settings = PolicyConfig(image=ImageProcessing(image_size=config.image_size), cameras=cameras)
    observation = dict(zip(cameras, _sample_images(config.num_views), strict=True))
    samples = [{"pixels": problem.pixels, "task_id": problem.task_id}]
    models: dict[str, Any] = {"VAT fp32": problem.vat}
    for dtype in ("fp32", "bf16", "int8"):
        try:
            models[f"frozen {dtype}"] = FrozenVAT(problem.vat, dtype=dtype, calibration=samples)  # type: ignore[arg-type]
        except ValueError as error:
            print(f"  frozen {dtype} left out: {error}")
    policies = {name: Policy(model, settings, _unit_statistics(config.action_dim)) for name, model in models.items()}
    calls = {name: (lambda p: lambda: p.act(observation, 0))(policy) for name, policy in policies.items()}
    # Before the gripper is rounded to open or closed, which hides small errors and shows others as large.
    actions = {name: torch.from_numpy(policy.predict([observation], 0)) for name, policy in policies.items()}
    errors = {name: relative(found, actions["VAT fp32"]) for name, found in actions.items()}
    timings, _ = interleave(calls["VAT fp32"], calls, rounds)
    return [{"name": name, "error": errors[name], **asdict(timing)} for name, timing in timings.items()]


def waterfall(preset: str, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Latency with one pass after the other switched on, then with faster executors and precisions."""
    problem = Problem.make(preset, 1, 2, seed)
    chosen = [p.name for p in PASSES if p.when(Target("torch", "fp32"))]
    calls: dict[str, Any] = {}
    always = "drop_dead_layer"  # what it drops has no weights, so it cannot be left out
    bars = [("no passes", [name for name in chosen if name != always])]
    for index, name in enumerate(chosen):
        if name != always:
            bars.append((name, [later for later in chosen[index + 1 :] if later != always]))
    rows = {}
    for name, without in bars:
        frozen = problem.vat.freeze(executor="torch", without=without)
        calls[name] = (lambda f: lambda: f(problem.pixels, problem.task_id))(frozen)
        rows[name] = relative(calls[name](), problem.truth)
    for rival in ("frozen onednn fp32", "frozen fp32", "frozen bf16", "frozen int8"):
        try:
            made = build(rival, problem)
        except (ImportError, ValueError, ArithmeticError) as error:
            print(f"  {rival} left out: {error}")
            continue
        calls[rival], rows[rival] = made.call, made.error
    with torch.inference_mode():
        timings, own = interleave(lambda: problem.reference(problem.pixels, problem.task_id), calls, rounds)
    return {
        "kind": "waterfall",
        "preset": preset,
        "batch": 1,
        "views": 2,
        "conditions": conditions(seed),
        "reference_p50_ms": float(np.median(own)),
        "bars": [{"name": name, "error": rows[name], **asdict(timings[name])} for name in calls],
    }


def save(result: dict[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """Write a result file, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path


def default_rivals(preset: str) -> list[str]:
    """All of them; for models of many seconds without those that take minutes to build."""
    return [name for name in RIVALS if name != REFERENCE and (preset in ROUNDS or name not in SLOW)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["vit-tiny", "siglip2-so400m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--views", nargs="+", type=int, default=[2])
    parser.add_argument("--rounds", type=int, help="timed rounds (default 200 for vit-tiny, 5 for so400m)")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), metavar="NAME", help=", ".join(RIVALS))
    parser.add_argument("--step-only", action="store_true", help="without the run from images to robot actions")
    parser.add_argument("--waterfall", action="store_true", help="what each pass brings, instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    for preset in options.presets[:1] if options.waterfall else options.presets:
        if options.waterfall:
            path = save(
                waterfall(preset, options.rounds or ROUNDS.get(preset, FEW_ROUNDS)), f"waterfall-{preset}", options.out
            )
            print(f"wrote {path}")
            continue
        for batch in options.batches:
            for views in options.views:
                rounds = options.rounds or max(ROUNDS.get(preset, FEW_ROUNDS) // batch, 3)
                print(f"{preset}, batch {batch}, {views} views, {rounds} rounds", flush=True)
                start = time.perf_counter()
                result = measure(
                    preset, batch, views, rounds, options.rivals or default_rivals(preset), not options.step_only
                )
                for row in sorted(result["rivals"], key=lambda row: row["p50_ms"]):
                    print(
                        f"  {row['name']:34}{row['p50_ms']:10.1f} ms  p99 {row['p99_ms']:8.1f}  {row['ratio']:5.2f}x "
                        f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})  error {row['error']:.1e}"
                    )
                path = save(result, f"step-{preset}-B{batch}-V{views}", options.out)
                print(f"  wrote {path} after {time.perf_counter() - start:.0f} s", flush=True)
                gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
