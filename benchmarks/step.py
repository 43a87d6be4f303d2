"""The policy step on this CPU: every rival in the same rounds, errors first, results in a file with their conditions.

    python -m benchmarks.step                                       vit-tiny and so400m, one sample, two views
    python -m benchmarks.step --all                                 three presets, batches 1 4 16, 1 to 3 views
    python -m benchmarks.step --presets vit-small --batches 1 4 16 --views 1 2 3
    python -m benchmarks.step --waterfall                           what each pass brings, vit-tiny

Writes benchmarks/results/step-<preset>-B<batch>-V<views>.json (waterfall-<preset>.json), each when it is finished. A
shape whose file is there is not run again, so a run that was interrupted goes on; --again runs it. Who would take
minutes in every round is left out, and the file says so. `python -m benchmarks.report` makes docs/performance.md and
the plots of what is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.floor import floor_ms, gemm_gflops, makers
from benchmarks.interleave import conditions, interleave
from benchmarks.parity import relative
from benchmarks.rivals import REFERENCE, RIVALS, Problem, build
from vat_fast import VATConfig
from vat_fast.cost import forward_cost
from vat_fast.files import write_text
from vat_fast.frozen.cpu import has_integers
from vat_fast.frozen.engine import FrozenVAT, make_plan
from vat_fast.frozen.gate import accept
from vat_fast.frozen.gate_inputs import plant_massive_activations, plant_outliers, realistic_samples
from vat_fast.frozen.passes import PASSES
from vat_fast.frozen.target import TAKES_SAMPLES, Precision, Target
from vat_fast.precision import multiplies_bfloat16

RESULTS = Path(__file__).with_name("results")
ROUNDS = {"vit-tiny": 200, "vit-small": 60}
FEW_ROUNDS = 5
"""For models that take seconds."""
SLOW = ("torch.compile max-autotune fp32", "ONNX Runtime fp32")
"""Not run by default where building takes minutes and gigabytes: with the large presets."""
SLOW_ROUNDS = (*SLOW, "torch.compile fp32", "VAT fp32")
"""Not run by default where a forward of the reference takes longer than LONG: each would add minutes to a shape, and
says little that smaller batches do not."""
LONG = 20.0
"""Seconds."""
PRESETS, BATCHES, VIEWS = ("vit-tiny", "vit-small", "siglip2-so400m"), (1, 4, 16), (1, 2, 3)
"""Of --all."""
EMULATED = ("reference autocast bf16", "OpenVINO bf16", "frozen bf16", "frozen onednn bf16")
"""Not run by default where the processor does not multiply bf16: emulated, a step takes up to 40 times as long."""
DTYPES: tuple[Precision, ...] = (
    "fp32",
    *(("bf16",) if multiplies_bfloat16("cpu") else ()),  # type: ignore[arg-type]
    *(("int16",) if has_integers() else ()),  # type: ignore[arg-type]
    "int8",
)
END_TO_END = "from images to actions"
GATE_SAMPLES = 4


def measure(
    preset: str,
    batch: int,
    views: int,
    rounds: int,
    names: Sequence[str],
    whole: bool = True,
    seed: int = 0,
    dropped: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The result file's content for one shape.

    Args:
        whole: also from camera images to robot actions, and for one sample the error gate of each precision.
        dropped: who is left out, and why; END_TO_END among them leaves that out.
    """
    where = conditions(seed)  # before the load is our own
    problem = Problem.make(preset, batch, views, seed)
    rows: list[dict[str, Any]] = []
    skipped = dict(dropped or {})
    references: list[float] = []
    # Of large models only a few at a time fit in memory; each group has rounds of the reference of its own.
    at_once = len(names) if preset in ROUNDS else 2
    for first in range(0, len(names), at_once):
        found, own = _group(problem, names[first : first + at_once], rounds, skipped)
        rows += [{**row, "samples_per_second": 1e3 * batch / row["p50_ms"]} for row in found]
        references += own
        gc.collect()
    floors = {}
    for dtype in DTYPES:
        milliseconds, rates = floor_ms(make_plan(problem.vat.config, batch, Target("torch", "fp32")), dtype)
        floors[dtype] = {"ms": milliseconds, "gflops_by_shape": rates, "of": list(makers(dtype))}
    outside = whole and END_TO_END not in skipped
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
        "end_to_end": end_to_end(problem, max(rounds // 4, 3), preset in ROUNDS) if outside else [],
        # Last: it changes the weights.
        "gate": gate_verdicts(problem) if whole and batch == 1 else {},
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


def end_to_end(problem: Problem, rounds: int, together: bool = True) -> list[dict[str, Any]]:
    """From raw camera images to robot actions through `Policy`: VAT, and frozen in each precision.

    Args:
        together: all in the same rounds; otherwise each precision beside VAT alone, for models that fill the memory.
    """
    from benchmarks.unit_statistics import unit_statistics
    from vat_fast.cli import _sample_images
    from vat_fast.observation import ImageProcessing
    from vat_fast.policy import Policy, PolicyConfig

    config, batch = problem.vat.config, len(problem.pixels)
    cameras = tuple(f"camera_{view}" for view in range(config.num_views))
    settings = PolicyConfig(image=ImageProcessing(image_size=config.image_size), cameras=cameras)
    observations = [dict(zip(cameras, _sample_images(config.num_views), strict=True))] * batch
    samples = [{"pixels": problem.pixels, "task_id": problem.task_id}]

    def policy(model: Any) -> Policy:
        return Policy(model, settings, unit_statistics(config.action_dim))

    def act(one: Policy) -> Callable[[], Any]:
        return lambda: one.act_batch(observations, 0)

    rows: dict[str, dict[str, Any]] = {}
    plain = policy(problem.vat)
    for dtypes in [DTYPES] if together else [(dtype,) for dtype in DTYPES]:
        policies = {"VAT fp32": plain}
        for dtype in dtypes:
            try:
                frozen = FrozenVAT(problem.vat, batch=batch, dtype=dtype, calibration=samples)
                policies[f"frozen {dtype}"] = policy(frozen)
            except ValueError as error:
                print(f"  frozen {dtype} left out: {error}")
        # Before the gripper is rounded to open or closed, which hides small errors and shows others as large.
        actions = {name: torch.from_numpy(one.predict(observations, 0)) for name, one in policies.items()}
        timings, _ = interleave(act(plain), {name: act(one) for name, one in policies.items()}, rounds)
        for name, timing in timings.items():
            error = relative(actions[name], actions["VAT fp32"])
            per_second = 1e3 * batch / timing.p50_ms
            rows.setdefault(name, {"name": name, "error": error, **asdict(timing), "samples_per_second": per_second})
        del policies
        gc.collect()
    return list(rows.values())


def gate_verdicts(problem: Problem, dtypes: Sequence[Precision] = DTYPES) -> dict[str, dict[str, Any]]:
    """By precision: the error gate's report on pictures like a robot's, with outlier channels planted in the weights.

    It changes the weights of `problem`: random ones have no outliers, and a gate without them proves little.
    """
    plant_massive_activations(problem.vat)
    plant_outliers(problem.vat)
    config = problem.vat.config
    samples, others = (realistic_samples(config, count, seed) for seed, count in ((1, GATE_SAMPLES), (2, 16)))
    verdicts = {}
    for dtype in dtypes:
        try:
            calibration = others if dtype in TAKES_SAMPLES else None
            frozen = problem.vat.freeze(dtype=dtype, calibration=calibration, record_layers=True)
        except (ImportError, ValueError) as error:
            print(f"  gate of {dtype} left out: {error}")
            continue
        report = accept(problem.vat, frozen, samples)
        verdicts[dtype] = report.to_dict()
        print(f"  gate: {report}", flush=True)
        del frozen
        gc.collect()
    return verdicts


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
    for rival in ("frozen onednn fp32", "frozen fp32", "frozen bf16", "frozen int16", "frozen int8"):
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


def default_rivals(preset: str, forward_s: float = 0.0) -> tuple[list[str], dict[str, str]]:
    """(who runs, who does not and why) for a preset whose reference takes `forward_s` seconds."""
    dropped: dict[str, str] = {}
    if not multiplies_bfloat16("cpu"):
        dropped = dict.fromkeys(EMULATED, "this processor does not multiply bfloat16; --rivals runs it")
    if preset not in ROUNDS:
        dropped |= dict.fromkeys(SLOW, "building it takes minutes and gigabytes at this size; --rivals runs it")
    if forward_s > LONG:
        why = f"a forward of the reference takes about {forward_s:.0f} s here, so each adds minutes; --rivals runs it"
        dropped = {**dict.fromkeys((*SLOW_ROUNDS, END_TO_END), why), **dropped}
    return [name for name in RIVALS if name != REFERENCE and name not in dropped], dropped


def estimated_seconds(config: VATConfig, batch: int, rounds: int, names: Sequence[str], gflops: float) -> float:
    """Roughly how long `measure` takes: rounds and warm-up of everybody at most at the reference's pace, and building.

    Args:
        gflops: what a matrix product in fp32 reaches here; a forward reaches some 70 % of it.
    """
    forward = forward_seconds(config, batch, gflops)
    everybody = 1.5 * len(names) + 4  # groups time the reference again; four policies from images to actions
    building = 2.0 + 40e-9 * make_plan(config, 1, Target("torch", "fp32")).parameters
    return (rounds + 3) * everybody * forward * 0.6 + building * (len(names) + 8)


def forward_seconds(config: VATConfig, batch: int, gflops: float) -> float:
    """Roughly, of the eager reference."""
    return batch * forward_cost(config).total / (0.7e9 * gflops)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["vit-tiny", "siglip2-so400m"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--views", nargs="+", type=int, default=[2])
    parser.add_argument(
        "--all", action="store_true", help=f"presets {', '.join(PRESETS)}, batches {BATCHES}, views {VIEWS}"
    )
    parser.add_argument("--again", action="store_true", help="also shapes whose result file is there")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 200 for vit-tiny, 5 for so400m)")
    parser.add_argument("--rivals", nargs="+", choices=list(RIVALS), metavar="NAME", help=", ".join(RIVALS))
    parser.add_argument(
        "--step-only", action="store_true", help="without the run from images to robot actions and gate"
    )
    parser.add_argument("--waterfall", action="store_true", help="what each pass brings, instead")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(arguments)
    if options.waterfall:
        preset = options.presets[0]
        rounds = options.rounds or ROUNDS.get(preset, FEW_ROUNDS)
        print(f"wrote {save(waterfall(preset, rounds), f'waterfall-{preset}', options.out)}")
        return 0
    if options.all:
        options.presets, options.batches, options.views = PRESETS, BATCHES, VIEWS
    shapes = [(p, b, v) for p in options.presets for b in options.batches for v in options.views]
    run_shapes(shapes, options)
    return 0


def run_shapes(shapes: Sequence[tuple[str, int, int]], options: argparse.Namespace) -> None:
    """Measure one (preset, batch, views) after the other, a file for each, with an estimate of the time left."""
    todo = []
    for preset, batch, views in shapes:
        path = options.out / f"step-{preset}-B{batch}-V{views}.json"
        if path.exists() and not options.again:
            print(f"{path} is there; --again measures it again")
        else:
            todo.append((preset, batch, views, path))
    if not todo:
        return
    gflops = gemm_gflops(512, 1152, 1152, "fp32")
    plans = []
    for preset, batch, views, path in todo:
        config = VATConfig.from_preset(preset, num_views=views)
        rounds = options.rounds or max(ROUNDS.get(preset, FEW_ROUNDS) // batch, 3)
        names, dropped = default_rivals(preset, forward_seconds(config, batch, gflops))
        if options.rivals:
            names, dropped = options.rivals, {}
        seconds = estimated_seconds(config, batch, rounds, names, gflops)
        plans.append((preset, batch, views, path, rounds, names, dropped, seconds))
    pace, took, expected = 1.0, 0.0, 0.0
    for index, (preset, batch, views, path, rounds, names, dropped, seconds) in enumerate(plans):
        left = pace * sum(plan[-1] for plan in plans[index:])
        print(
            f"{preset}, batch {batch}, {views} views, {rounds} rounds: about {_minutes(pace * seconds)}, "
            f"{len(plans) - index} shapes to go, about {_minutes(left)}",
            flush=True,
        )
        start = time.perf_counter()
        result = measure(preset, batch, views, rounds, names, not options.step_only, dropped=dropped)
        for row in sorted(result["rivals"], key=lambda row: row["p50_ms"]):
            print(
                f"  {row['name']:34}{row['p50_ms']:10.1f} ms  p99 {row['p99_ms']:8.1f}  {row['ratio']:5.2f}x "
                f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})  error {row['error']:.1e}"
            )
        save(result, path.stem, options.out)
        took, expected = took + time.perf_counter() - start, expected + seconds
        pace = took / expected  # what is finished says how far off the estimate is
        print(f"  wrote {path} after {_minutes(time.perf_counter() - start)}", flush=True)
        gc.collect()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
