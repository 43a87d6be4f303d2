"""The main job on one machine without a GPU: collect, train, roll out, report. `make demo` runs it.

Each step is a command that can be run by hand; it is printed before it starts. A step that was done is not done again,
and one that was interrupted goes on, so that the same call finishes an interrupted demo. Everything is in runs/demo.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("runs/demo")
CONFIG = Path("train/configs/demo.yaml")
SUITE, TASK = "object", "0"
COLLECTED, HELD_OUT = "0-29", "30-49"
DISPLACE_CM = 5
REPLAN_EVERY = 8
"""Steps between two looks: whole chunks."""
MOVES = {
    "standard": ("as LIBERO places them", "--displace 0"),
    "moved": (f"moved by up to {DISPLACE_CM} cm", f"--displace {DISPLACE_CM}"),
}
"""Name of the folders -> what to call it, and the option."""


class Step(NamedTuple):
    """One command and the file that says it is done."""

    what: str
    command: str
    done: Path


def steps() -> Iterator[Step]:
    """The whole job, in its order."""
    demos, trained, blind = OUT / "demonstrations", OUT / "training", OUT / "blind"
    yield Step(
        "demonstrations by a scripted expert, every one with the objects elsewhere",
        f"vat-fast collect --suite {SUITE} --tasks {TASK} --episodes 60 --init-states {COLLECTED} --size 160 "
        f"--render fast --displace {DISPLACE_CM + 2} --noise 0.25 --recoveries --disturbed-share 0.7 --out {demos}",
        demos / "finished",
    )
    yield Step(
        "training on two ranks; its eyes know LIBERO's objects already (checkpoints/eyes)",
        f"deepspeed --num_gpus 2 train/main.py --config {CONFIG}",
        trained / "policy" / "policy.json",
    )
    yield Step(
        "a blind policy to compare with: no images, only where the robot is",
        f"python -m vat_fast.train.blind {trained}/data/demonstrations --out {blind}",
        blind / "blind.json",
    )
    for move, (words, displace) in MOVES.items():
        episodes = f"--suite {SUITE} --tasks {TASK} --init-states {HELD_OUT} {displace} --replan-every {REPLAN_EVERY}"
        images = "--size 160 --render fast"
        without, seeing = OUT / f"blind_{move}", OUT / f"policy_{move}"
        yield Step(
            f"20 episodes from initial states never collected, objects {words}: the blind policy",
            f"vat-fast eval {blind} {episodes} {images} --out {without}",
            without / "finished",
        )
        yield Step(
            "the same episodes: the policy that sees",
            f"vat-fast eval {trained}/policy {episodes} {images} --baseline {without} --video 0:30,0:31 --out {seeing}",
            seeing / "finished",
        )


def run(step: Step) -> None:
    """Run one step where it is not done.

    Raises:
        SystemExit: the command failed.
    """
    print(f"\n== {step.what}", flush=True)
    if step.done.exists():
        print(f"   done before ({step.done})", flush=True)
        return
    print(f"   {step.command}", flush=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    start = time.perf_counter()
    status = subprocess.run(shlex.split(step.command), env=environment, check=False).returncode
    if status:
        raise SystemExit(f"that step failed with status {status}; the same command goes on from here")
    if not step.done.exists():
        step.done.touch()
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)


def summary() -> str:
    """What came out, as a table and three lines."""
    lines = ["", f"{'objects':28} {'policy':>24} {'blind':>24}"]
    for move, (words, _) in MOVES.items():
        cells = []
        for name in ("policy", "blind"):
            row = _result(f"{name}_{move}")["tasks"][-1]
            cells.append(f"{row['successes']}/{row['episodes']} ({100 * row['low']:.0f} to {100 * row['high']:.0f} %)")
        lines.append(f"{words:28} {cells[0]:>24} {cells[1]:>24}")
    predict = _result("policy_moved")["latency_ms"]["predict"]
    rate = REPLAN_EVERY * 1000 / predict["p50"]
    lines += [
        "",
        f"policy latency, images to actions: p50 {predict['p50']:.1f} ms, p99 {predict['p99']:.1f} ms",
        f"control rate it allows, re-planning every {REPLAN_EVERY} steps: {rate:.0f} Hz (LIBERO runs at 20)",
        f"videos: {OUT}/policy_*/videos; reports: {OUT}/policy_standard/report.html, {OUT}/policy_moved/report.html",
    ]
    return "\n".join(lines)


def _result(name: str) -> Any:
    return json.loads((OUT / name / "result.json").read_text(encoding="utf-8"))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--again", action="store_true", help="remove what an earlier demo left and start anew")
    again = parser.parse_args().again
    os.chdir(ROOT)
    if again:
        shutil.rmtree(OUT, ignore_errors=True)
    start = time.perf_counter()
    for step in steps():
        run(step)
    print(summary())
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
