"""Episodes per hour: the plain loop as papers run it against `evaluate`, on the same initial states.

    python -m benchmarks.rollout --suite spatial --out docs/rollout.json

The plain loop is LIBERO's own environment as the authors' evaluation uses it: one process, a hard reset before each
episode, both cameras rendered at every step, an eager policy. All policies are random, so that every episode runs to
`--steps`, by default about as long as a successful one. The loops take turns; ratios are within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vat_fast.actions import FieldStatistics, Statistics
from vat_fast.config import VATConfig
from vat_fast.files import write_text
from vat_fast.model import VAT
from vat_fast.observation import ImageProcessing
from vat_fast.policy import Policy, PolicyConfig
from vat_fast.rollout.conditions import conditions
from vat_fast.rollout.install_check import check_simulator, import_simulator
from vat_fast.rollout.libero import evaluate_libero, libero_settings
from vat_fast.rollout.settings import SETTLING_ACTION, EvaluationSettings
from vat_fast.rollout.states import task_files
from vat_fast.tasks import TaskTable


def random_policy(preset: str, names: list[str], frozen: bool) -> Policy:
    """A random VAT that reads two cameras, eager or frozen, and hardly moves the robot."""
    torch.manual_seed(0)
    config = VATConfig.from_preset(preset, num_tasks=len(names))
    vat = VAT(config).eval()
    one = np.ones(7)
    statistics = Statistics("random", FieldStatistics(0 * one, one, -one, one, -0.1 * one, 0.1 * one))
    settings = PolicyConfig(
        image=ImageProcessing(image_size=config.image_size),
        tasks=TaskTable({name: index for index, name in enumerate(names)}),
        statistics_key="random",
    )
    return Policy(vat.freeze() if frozen else vat, settings, statistics)


def plain(policy: Policy, settings: EvaluationSettings) -> dict[str, float]:
    """LIBERO's own environment stepped as in the authors' evaluation; making it is not counted."""
    torch.set_num_threads(os.cpu_count() or 1)
    check_simulator()
    import_simulator()
    from libero.libero.envs import OffScreenRenderEnv

    seconds = 0.0
    for task in settings.tasks:
        files = task_files(settings.suite, task)
        size = settings.image_size
        env = OffScreenRenderEnv(bddl_file_name=str(files.bddl), camera_heights=size, camera_widths=size)
        env.seed(0)
        start = time.perf_counter()
        for state in settings.init_states:
            policy.reset()
            env.reset()
            observation = env.set_init_state(files.init_states[state])
            for _ in range(settings.settling_steps):
                observation = env.step(list(SETTLING_ACTION))[0]
            for _ in range(settings.max_steps):
                action = policy.step(observation, files.name)
                observation, _, done, _ = env.step(action.tolist())
                if done:
                    break
        seconds += time.perf_counter() - start
        env.close()
    return _figures(len(settings.episodes), seconds)


def evaluated(policy: Policy, settings: EvaluationSettings, processes: int) -> dict[str, float]:
    """`evaluate`, the start of its processes and scenes counted, and without it."""
    # The simulators keep the other cores busy.
    torch.set_num_threads(1)
    result = evaluate_libero(policy, settings, processes=processes, progress=False)
    assert len(result.records) == len(settings.episodes)
    looks = [ms for record in result.records for ms in record.observe_ms]
    thoughts = [ms for record in result.records for ms in record.predict_ms]
    return {
        **_figures(len(result.records), result.seconds),
        "start_seconds": round(result.start_seconds, 1),
        "episodes_per_hour_after_start": round(3600 * len(result.records) / (result.seconds - result.start_seconds), 1),
        "observe_ms": round(float(np.median(looks)), 1),
        "predict_ms": round(float(np.median(thoughts)), 1),
        "step_ms": round(float(np.median([record.step_ms for record in result.records])), 1),
    }


def batching(policy: Policy, names: list[str], count: int, repeats: int = 9) -> dict[str, Any]:
    """Predictions for `count` robots one by one against one forward pass: time, and whether they are equal."""
    rng = np.random.default_rng(0)
    cameras = policy.config.cameras
    observations = [{c: rng.integers(0, 256, (256, 256, 3), np.uint8) for c in cameras} for _ in range(count)]
    tasks = [names[i % len(names)] for i in range(count)]
    times: dict[str, list[float]] = {"alone": [], "together": []}
    for _ in range(repeats):
        start = time.perf_counter()
        alone = np.concatenate([policy.predict([o], [t]) for o, t in zip(observations, tasks, strict=True)])
        middle = time.perf_counter()
        together = policy.predict(observations, tasks)
        times["alone"].append(middle - start)
        times["together"].append(time.perf_counter() - middle)
    return {
        "robots": count,
        "alone_ms": round(1e3 * float(np.median(times["alone"])), 1),
        "together_ms": round(1e3 * float(np.median(times["together"])), 1),
        "equal": bool((alone == together).all()),
        "largest_difference": float(np.abs(alone - together).max()),
    }


def _figures(episodes: int, seconds: float) -> dict[str, float]:
    return {
        "episodes": episodes,
        "seconds": round(seconds, 1),
        "episodes_per_hour": round(3600 * episodes / seconds, 1),
    }


def combined(rounds: list[dict[str, float]], base: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over the rounds, and how many times the plain loop of the same round: median, lowest and highest."""
    rates = {name: [r[name] for r in rounds] for name in rounds[0]}
    result: dict[str, Any] = {name: round(float(np.median(values)), 1) for name, values in rates.items()}
    result["episodes_per_hour_by_round"] = rates["episodes_per_hour"]
    for name in ("episodes_per_hour", "episodes_per_hour_after_start"):
        if name in rates:
            ratios = [rate / b["episodes_per_hour"] for rate, b in zip(rates[name], base, strict=True)]
            low, middle, high = min(ratios), float(np.median(ratios)), max(ratios)
            result[name.replace("episodes_per_hour", "times_plain")] = [round(low, 2), round(middle, 2), round(high, 2)]
    return result


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="spatial")
    parser.add_argument("--task", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100, help="of each episode (default 100)")
    parser.add_argument("--rounds", type=int, default=3, help="in which the loops take turns (default 3)")
    parser.add_argument("--plain-episodes", type=int, default=3, help="of the plain loop in a round (default 3)")
    parser.add_argument("--episodes", type=int, default=24, help="of each evaluation in a round (default 24)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--preset", default="vit-tiny")
    parser.add_argument("--out", type=Path, default=Path("docs/rollout.json"))
    args = parser.parse_args()

    def settings(episodes: int, **options: Any) -> EvaluationSettings:
        return libero_settings(args.suite, (args.task,), step_limit=args.steps, init_states=range(episodes), **options)

    suite = settings(1).suite
    names = [task_files(suite, args.task).name]
    eager, frozen = (random_policy(args.preset, names, frozen) for frozen in (False, True))
    official, fast = settings(args.episodes), settings(args.episodes, render="fast")
    loops: dict[str, Callable[[], dict[str, float]]] = {
        "plain loop": lambda: plain(eager, settings(args.plain_episodes)),
        f"evaluate, official rendering, {args.processes} processes": lambda: evaluated(
            frozen, official, args.processes
        ),
        f"evaluate, fast rendering, {args.processes} processes": lambda: evaluated(frozen, fast, args.processes),
    }
    load_average = round(os.getloadavg()[0], 2)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for _ in range(args.rounds):
        for name, loop in loops.items():
            found[name].append(loop())
            print(f"{name:50s} {found[name][-1]}", flush=True)
    results = {name: combined(rounds, found["plain loop"]) for name, rounds in found.items()}
    together = {kind: batching(policy, names, 2) for kind, policy in (("eager", eager), ("frozen", frozen))}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    content = {
        "conditions": {
            **conditions(),
            "commit": commit.stdout.strip(),
            "load_average": load_average,
            "suite": suite,
            "task": args.task,
            "steps_per_episode": args.steps,
            "rounds": args.rounds,
            "policy": f"{args.preset}, random, fp32, chunk of {eager.chunk_size} executed open loop",
            "policy_form": {"plain loop": "eager", "evaluate": "frozen"},
            "image_size": 256,
            "start": "counted for evaluate, not for the plain loop",
            "policy_threads": {"plain loop": os.cpu_count(), "evaluate": 1},
        },
        "results": results,
        "batching": together,
    }
    write_text(args.out, json.dumps(content, indent=2) + "\n")
    print(f"{'':50s} {'episodes/h':>10s} {'x plain':>8s}   lowest to highest")
    for name, figures in results.items():
        low, middle, high = figures["times_plain"]
        print(f"{name:50s} {figures['episodes_per_hour']:10.0f} {middle:8.1f}   {low:.1f} to {high:.1f}")
    print(json.dumps(together, indent=2))


if __name__ == "__main__":
    main()
